"""How far an adversary can push a model, how sure that number is, and what it costs in clean accuracy to do better.

The doors: :func:`evaluate` for a number with its interval and the examples behind it, :func:`run` to attack one batch,
:func:`perturb` for training. Attacks are in :mod:`advkit.attacks`, training losses in :mod:`advkit.defenses`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from advkit.version import __version__ as __version__

if TYPE_CHECKING:
    from advkit.benchmarks.evaluate import evaluate as evaluate
    from advkit.benchmarks.result import Evaluation as Evaluation
    from advkit.benchmarks.suites import standard as standard
    from advkit.benchmarks.transfer import TransferMatrix as TransferMatrix
    from advkit.benchmarks.transfer import transfer_matrix as transfer_matrix
    from advkit.combine import Expect as Expect
    from advkit.combine import Restarts as Restarts
    from advkit.combine import Worst as Worst
    from advkit.engine import Attack as Attack
    from advkit.engine import AttackResult as AttackResult
    from advkit.engine import frozen as frozen
    from advkit.engine import perturb as perturb
    from advkit.engine import run as run
    from advkit.errors import AccessError as AccessError
    from advkit.errors import ModelError as ModelError
    from advkit.errors import UsageError as UsageError
    from advkit.latent import Latent as Latent
    from advkit.oracle import Access as Access
    from advkit.oracle import Goal as Goal
    from advkit.oracle import Oracle as Oracle
    from advkit.surrogates import Ensemble as Ensemble
    from advkit.surrogates import transfer as transfer
    from advkit.threat import Colour as Colour
    from advkit.threat import Flow as Flow
    from advkit.threat import Lp as Lp
    from advkit.threat import Masked as Masked
    from advkit.threat import Rotation as Rotation
    from advkit.threat import Sticker as Sticker

# Imported when they are first asked for: the command line answers at once, and can be stopped while torch is loading.
_HOMES = {
    "benchmarks.evaluate": ("evaluate",),
    "benchmarks.result": ("Evaluation",),
    "benchmarks.transfer": ("TransferMatrix", "transfer_matrix"),
    "benchmarks.suites": ("standard",),
    "combine": ("Expect", "Restarts", "Worst"),
    "engine": ("Attack", "AttackResult", "frozen", "perturb", "run"),
    "errors": ("AccessError", "ModelError", "UsageError"),
    "latent": ("Latent",),
    "oracle": ("Access", "Goal", "Oracle"),
    "surrogates": ("Ensemble", "transfer"),
    "threat": ("Colour", "Flow", "Lp", "Masked", "Rotation", "Sticker"),
}
_HOME = {name: f"advkit.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'advkit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
