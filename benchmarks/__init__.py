"""Measuring attacks and models: evaluations, benchmarks, checks, reports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkit.benchmarks.runner import run as run


def __getattr__(name: str) -> Any:
    # Imported when it is asked for, so that the command line answers at once.
    if name != "run":
        raise AttributeError(f"module 'advkit.benchmarks' has no attribute {name!r}")
    from advkit.benchmarks.runner import run

    return run
