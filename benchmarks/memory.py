"""Batches that fit the device: a batch that does not is tried again in halves, and no row is lost."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from advkit.engine import AttackResult
from advkit.errors import ModelError, UsageError

T = TypeVar("T")
_NO_MEMORY = re.compile("DefaultCPUAllocator: (can't allocate|not enough) memory")


@dataclass
class Fit:
    """How many rows go to the device at a time.

    Attributes:
        size: The most so far; it is halved when the device has no memory left, and stays so.
    """

    size: int

    def parts(self, rows: Tensor, call: Callable[[Tensor], T]) -> list[T]:
        """What ``call``, which takes the numbers of some rows, returns for all ``rows``, (M,), part by part in their order.

        Raises:
            UsageError: The device has no memory for a single row.
        """
        found: list[T] = []
        done = 0
        while done < len(rows):
            part = rows[done : done + self.size]
            try:
                found.append(call(part))
            except (RuntimeError, ModelError) as error:
                self._halve(error, len(part))
                continue
            done += len(part)
        return found

    def _halve(self, error: RuntimeError | ModelError, size: int) -> None:
        """Make do with half, or raise."""
        if not out_of_memory(error):
            raise error
        if size == 1:
            raise UsageError("the device has no memory for a single example; use another device, or a smaller model") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = max(1, size // 2)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or bool(_NO_MEMORY.search(str(error)))


def joined(parts: list[AttackResult]) -> AttackResult:
    """The results of several parts as one."""

    def column(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return AttackResult(**{field.name: column(field.name) for field in fields(AttackResult)})


def start_peak(device: torch.device) -> None:
    """Measure the peak from here on, where a device keeps one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """The most bytes in use: of the device since :func:`start_peak`, or, on a CPU, of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # a system that does not say
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
