"""The curves of a training run for TensorBoard, where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advkit.errors import UsageError
from advkit.train import Progress


def tensorboard(folder: str | Path) -> Callable[[Progress], None]:
    """A ``report`` for training that writes TensorBoard's event files: the loss, and each epoch's clean and robust accuracy.

    Arguments:
        folder: Where to write.

    Raises:
        UsageError: TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("TensorBoard is not installed; install it with pip install tensorboard") from None
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from None
    said = 0

    def report(progress: Progress) -> None:
        nonlocal said
        _add(writer, "loss", progress.loss, progress.step)
        for check in progress.history[said:]:
            shares = {"clean": check.clean, "robust": check.robust, "one step": check.one_step}
            for name, value in shares.items():
                _add(writer, f"accuracy/{name}", value, check.epoch + 1)
        said = len(progress.history)
        if progress.step == progress.steps or said:
            writer.flush()

    return report


def _add(writer: Any, name: str, value: float | None, at: int) -> None:
    """Write a number where there is one; a run that goes on has no loss before its first step."""
    if value is not None and math.isfinite(value):
        writer.add_scalar(name, value, at)
