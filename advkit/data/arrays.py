"""Data that is already in memory, or in an ``.npz`` file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from advkit.data.dataset import Data, check_labels, check_range, spread, spread_notes
from advkit.errors import UsageError, first_line

PAIRS = (("x", "y"), ("images", "labels"), ("data", "labels"))
"""The names that inputs and labels may have in a file or a dict, besides ``x_test`` and ``y_test`` for a split ``test``."""
CHANNELS = (1, 3, 4)
ROWS = 1024


def from_tensors(
    x: Any,
    y: Any,
    name: str = "data",
    low: float | None = None,
    high: float | None = None,
    classes: Sequence[str] = (),
) -> Data:
    """Data from a batch of inputs and their labels.

    Arguments:
        x: A tensor or array, batch-first. 8-bit integers become floats, 0 at low (by default 0) and 255 at high (by default
            1); as images, (N, H, W) becomes (N, 1, H, W) and (N, H, W, C) becomes (N, C, H, W). Other numbers are taken as
            they are, in shape (N, *): float64 arrays in float64, and everything else, lists too, in float32.
        y: The labels, with shape (N,): integers from 0 on, or floats that are whole.
        name: What to call it.
        low: The least value that the data may have. Without a range, values in [0, 1] or else in [-1, 1] are taken to fill
            it, which ``notes`` says; others are refused.
        high: The greatest.
        classes: The names of the labels 0, 1, ...

    Raises:
        UsageError: The inputs or the labels are not of this form, or not in the range.

    >>> data = from_tensors(torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([3, 7]))
    >>> data.batch(0, 2)[0].shape, data.kind, data.levels
    (torch.Size([2, 1, 28, 28]), 'image', 255)
    """
    x, y = _tensor(x, "inputs"), _labels(_tensor(y, "labels"))
    if x.ndim < 2 or not x.numel():
        raise UsageError(f"the inputs of {name} have shape {tuple(x.shape)}; they should be (N, *) with at least one example")
    check_labels(y, tuple(classes))
    if len(x) != len(y):
        raise UsageError(f"{name} has {len(x)} inputs and {len(y)} labels; there should be one label for each")
    given = check_range(low, high, torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.dtype == torch.uint8:
        return _from_bytes(_channels_first(x), y, name, given or (0.0, 1.0), tuple(classes))
    return _from_numbers(_to_float(x), y, name, given, tuple(classes))


def _tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return _plain(values, what)
    array = _array(values, what)
    if array.dtype.kind not in "buif":
        raise UsageError(f"the {what} are of type {array.dtype}; they should be numbers")
    # torch knows no foreign byte orders, no negative strides, few wide types, and warns of arrays that it must not write.
    wide = _TORCH_KNOWS.get(array.dtype.kind, array.dtype) if array.itemsize > _NARROW[array.dtype.kind] else array.dtype
    return torch.from_numpy(np.array(array, dtype=wide.newbyteorder("="), order="C", copy=not array.flags.writeable or None))


_TORCH_KNOWS = {"u": np.dtype(np.int64), "f": np.dtype(np.float64)}
_NARROW = {"b": 1, "u": 1, "i": 8, "f": 8}


def _plain(tensor: Tensor, what: str) -> Tensor:
    kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized or tensor.layout is not torch.strided:
        raise UsageError(f"the {what} are a {kind} tensor; they should be a dense one")
    if tensor.is_meta:
        raise UsageError(f"the {what} are on the device meta, without values; they should be on the CPU or an accelerator")
    return tensor.detach().cpu()


def _array(values: Any, what: str) -> np.ndarray[Any, Any]:
    """An array; a list of Python's floats, which have no precision that anyone chose, becomes float32."""
    try:
        array = np.asarray(values)
    except Exception as error:  # numpy asks the object, and what that raises is its own
        kind = type(values).__name__
        raise UsageError(
            f"the {what} are of type {kind}, not an array: {first_line(error)}; rows should have one shape"
        ) from error
    return array.astype(np.float32) if isinstance(values, list | tuple) and array.dtype == np.float64 else array


def _labels(y: Tensor) -> Tensor:
    if y.is_complex() or (y.is_floating_point() and not _whole(y.to(torch.float64))):
        raise UsageError("the labels hold values that are not whole; they should be 0, 1, 2 and so on")
    return y.to(torch.int64)


def _whole(y: Tensor) -> bool:
    return bool((y == y.round()).logical_and(y.isfinite()).all())


def _to_float(x: Tensor) -> Tensor:
    """float64 as it is, and other numbers in float32."""
    if x.is_complex():
        raise UsageError("the inputs are complex; they should be real numbers")
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    if not bool(x.isfinite().all()):
        raise UsageError("the inputs hold NaN or infinite values; they should be finite")
    return x


def _channels_first(x: Tensor) -> Tensor:
    if x.ndim == 3:
        return x.unsqueeze(1)
    if x.ndim == 4 and x.shape[1] not in CHANNELS and x.shape[3] in CHANNELS:
        return x.permute(0, 3, 1, 2).contiguous()
    return x


def _from_bytes(x: Tensor, y: Tensor, name: str, bounds: tuple[float, float], classes: tuple[str, ...]) -> Data:
    return Data(
        name=name,
        y=y,
        take=lambda numbers: spread(x[numbers], *bounds),
        low=bounds[0],
        high=bounds[1],
        kind="image" if x.ndim == 4 else "features",
        index=torch.arange(len(y)),
        fingerprint=lambda numbers: _sha256(x, numbers),
        classes=classes,
        levels=255,
        notes=spread_notes(*bounds),
    )


def _from_numbers(x: Tensor, y: Tensor, name: str, given: tuple[float, float] | None, classes: tuple[str, ...]) -> Data:
    low, high = _bounds(float(x.min()), float(x.max()), name, given)
    inferred = f"the range [{low:g}, {high:g}] of {name} was inferred from its values"
    return Data(
        name=name,
        y=y,
        take=lambda numbers: x[numbers],
        low=low,
        high=high,
        kind=_kind(x, low, high),
        index=torch.arange(len(y)),
        fingerprint=lambda numbers: _sha256(x, numbers),
        classes=classes,
        notes=() if given else (inferred,),
    )


def _bounds(least: float, most: float, name: str, given: tuple[float, float] | None) -> tuple[float, float]:
    """The range of values between ``least`` and ``most``: the one given, or one that is usual."""
    for low, high in [given] if given else [(0.0, 1.0), (-1.0, 1.0)]:
        if low <= least and most <= high:
            return low, high
    observed = f"the values of {name} are in [{least:.6g}, {most:.6g}]"
    if given:
        raise UsageError(f"{observed}; the range given is [{given[0]:g}, {given[1]:g}]")
    raise UsageError(f"{observed}; say what range they may have with --range LOW HIGH (in Python, low= and high=)")


def _kind(x: Tensor, low: float, high: float) -> str:
    if x.ndim == 4 and x.shape[1] in CHANNELS and low == 0:
        return "image"
    is_waveform = x.ndim == 2 or (x.ndim == 3 and x.shape[1] == 1)
    return "waveform" if is_waveform and (low, high) == (-1, 1) else "features"


def _sha256(x: Tensor, numbers: Tensor) -> str:
    sha = hashlib.sha256(f"{x.dtype} {tuple(x.shape[1:])}".encode())
    for some in numbers.split(ROWS):
        sha.update(x[some].numpy().tobytes())
    return sha.hexdigest()


def from_dict(arrays: Mapping[str, Any], name: str, split: str, low: float | None = None, high: float | None = None) -> Data:
    """Data from named arrays.

    Arguments:
        arrays: ``x_<split>`` and ``y_<split>``, or ``x`` and ``y``, ``images`` and ``labels``, or ``data`` and ``labels``, as
            :func:`from_tensors` takes them; perhaps the numbers ``low`` and ``high``, and the strings ``classes``.
        name: What to call it.
        split: The split to take, where there are several.
        low: The least value that the data may have; a range given here goes before that of ``arrays``.
        high: The greatest.

    Raises:
        UsageError: These arrays are not there, or are not data.
    """
    x, y = _pair(arrays, name, split)
    if low is None and high is None:
        low, high = _number(arrays, "low"), _number(arrays, "high")
    classes = [str(item) for item in np.atleast_1d(arrays["classes"])] if "classes" in arrays else []
    return from_tensors(arrays[x], arrays[y], name, low, high, classes)


def _pair(arrays: Mapping[str, Any], name: str, split: str) -> tuple[str, str]:
    for x, y in ((f"x_{split}", f"y_{split}"), *PAIRS):
        if x in arrays and y in arrays:
            return x, y
    splits = [key[2:] for key in arrays if key.startswith("x_") and f"y_{key[2:]}" in arrays]
    if splits:
        raise UsageError(f"{name} has no split {split!r}; it has {', '.join(sorted(splits))}")
    found = ", ".join(sorted(arrays)) or "nothing"
    raise UsageError(f"{name} holds {found}; it should hold x and y, images and labels, data and labels, or x_test and y_test")


def _number(arrays: Mapping[str, Any], key: str) -> float | None:
    if key not in arrays:
        return None
    value = np.asarray(arrays[key])
    if value.size != 1 or value.dtype.kind not in "buif":
        raise UsageError(f"{key} is an array of type {value.dtype} and shape {value.shape}; it should be one number")
    return float(value.item())


def read_npz(path: str, split: str, low: float | None = None, high: float | None = None) -> Data:
    """The data of an ``.npz`` file, with the arrays that :func:`from_dict` takes.

    Raises:
        UsageError: The file cannot be read, or holds pickled objects or other arrays.
    """
    try:
        # numpy leaves a file open that it opened by name and then could not read.
        with Path(path).expanduser().open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, NpzFile):
                raise ValueError("it holds one array without a name")
            return from_dict(arrays, path, split, low, high)
    except UsageError:
        raise
    except Exception as error:  # damaged files raise almost anything
        raise UsageError(
            f"cannot read {path}: {first_line(error)}; it should be an .npz file without pickled objects"
        ) from error
