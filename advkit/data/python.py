"""Data that a function of the user's own gives: ``path/to/file.py:function`` and ``package.module:function``."""

from __future__ import annotations

import torch

from advkit.data.arrays import from_dict, from_tensors
from advkit.data.dataset import Data, check_range
from advkit.errors import UsageError
from advkit.python import call


def read_python(spec: str, split: str, low: float | None = None, high: float | None = None) -> Data:
    """The data that a function gives: :class:`Data`, a pair (x, y), or a dict as for :func:`from_dict`.

    Arguments:
        spec: As for :func:`advkit.python.resolve`.
        split: Passed to the function, if it takes a keyword ``split``.
        low: The least value that the data may have, where the function returns arrays.
        high: The greatest.

    Raises:
        UsageError: As for :func:`advkit.python.call`, or the function returns something else.
    """
    given = call(spec, "data", split=split)
    if isinstance(given, Data):
        if check_range(low, high) and not _is_range(given, low, high):
            raise UsageError(f"{spec} returned data in [{given.low:g}, {given.high:g}]; leave the range out, or give this one")
        return given
    if isinstance(given, dict):
        return from_dict(given, spec, split, low, high)
    if isinstance(given, tuple | list) and len(given) == 2:
        return from_tensors(given[0], given[1], spec, low, high)
    raise UsageError(f"{spec} returned {type(given).__name__}; it should return Data, a pair (x, y) or a dict with x and y")


def _is_range(data: Data, low: float | None, high: float | None) -> bool:
    """Whether the data have this range, as they round it."""
    return (data.low, data.high) in [check_range(low, high, dtype) for dtype in (torch.float32, torch.float64)]
