"""Live progress on stderr: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from advkit.benchmarks.evaluate import Status
    from advkit.stochastic import Progress as Fit
    from advkit.train import Progress

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[float, str], None]]:
    """Something to call with the share done and a text."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    if sys.stderr is None or not sys.stderr.isatty():
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _updater(bar)


def _updater(bar: Bar) -> Callable[[float, str], None]:
    task = bar.add_task("", total=1.0)
    return lambda share, text: bar.update(task, completed=share, description=text)


def _lines() -> Callable[[float, str], None]:
    said = time.monotonic()

    def tell(share: float, text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"{100 * share:3.0f} %  {text}", file=sys.stderr, flush=True)

    return tell


@contextlib.contextmanager
def attacking() -> Iterator[Callable[[Status], None]]:
    """Progress of an evaluation."""
    began = time.monotonic()
    with _bar() as tell:

        def report(status: Status) -> None:
            speed = (status.done - status.start) / max(time.monotonic() - began, 1e-9)
            robust = 100 * status.robust / status.seen
            tell(status.done / status.total, f"robust {robust:.1f} % of {status.seen}, {speed:.1f} examples/s, {status.attack}")

        yield report


@contextlib.contextmanager
def training() -> Iterator[Callable[[Progress], None]]:
    """Progress of a training run."""
    with _bar() as tell:

        def report(at: Progress) -> None:
            last = at.history[-1] if at.history else None
            worth = f", clean {100 * last.clean:.1f} %, robust {100 * last.robust:.1f} %" if last else ""
            tell(at.step / at.steps, f"epoch {at.epoch + 1} of {at.epochs}, loss {at.loss:.4f}{worth}")

        yield report


@contextlib.contextmanager
def shares() -> Iterator[Callable[[float, str], None]]:
    """Progress of what says its share and a text."""
    with _bar() as tell:
        yield tell


@contextlib.contextmanager
def fitting() -> Iterator[Callable[[Fit], None]]:
    """Progress of learning one change for many inputs."""
    with _bar() as tell:
        yield lambda at: tell(at.step / at.steps, f"step {at.step} of {at.steps}, success {100 * at.rate:.1f} %")
