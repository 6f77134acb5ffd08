"""Data by name: the sample that comes with advkit, files, folders, the hub's data sets, and the user's own Python."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from advkit.data import folder, huggingface
from advkit.data.arrays import from_tensors as from_tensors
from advkit.data.arrays import read_npz
from advkit.data.dataset import Data as Data
from advkit.data.dataset import check_seed as check_seed
from advkit.data.embedded import mnist_5k
from advkit.data.generated import from_source as from_source
from advkit.data.generated import read_generated
from advkit.data.images import Pictures
from advkit.data.python import read_python
from advkit.data.sounds import Sounds, strings
from advkit.errors import UsageError
from advkit.python import is_python
from advkit.spec import check_at_least, unknown

DATA = {
    "mnist-5k": "5,000 MNIST digits that come with advkit: 4,000 train, 1,000 test",
    "hf:org/name": "a data set of the Hugging Face hub with labelled images or sounds; hf:org/name@config for a configuration",
    "path/to/folder": "a folder of Parquet files in the hub's layout, or with a folder of images or of sounds for each class; "
    "in the hub's layout, path/to/folder@column=value holds out the examples whose column has the value as the split test",
    "strings:SPEC": "one to four words of labelled sounds after each other, labelled with the text",
    "path/to/file.npz": "arrays x and y, images and labels, data and labels, or x_test and y_test",
    "path/to/file.safetensors": "what a generator draws that advkit gan train wrote: 20,000 train, 10,000 test",
    "path/to/file.py:function": "what your function returns: (x, y), a dict with x and y, or Data",
    "package.module:function": "the same, of an installed module",
}
"""What a spec may name, and what it is."""


def load(
    spec: str,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    low: float | None = None,
    high: float | None = None,
    size: int | None = None,
) -> Data:
    """The data that a spec names.

    Arguments:
        spec: One of the forms in ``DATA``. Only ``hf:`` may download; only the last two run code.
        split: Which split, where there are several.
        limit: The most examples, with the classes in proportion; None for all.
        seed: Of the choice that the limit makes: a whole number from 0 to 2**63 - 1.
        low: The least value that the data may have. Images and other 8-bit data are mapped to [low, high], by default
            [0, 1]; other data must be inside, and where no range is given, must be in [0, 1] or [-1, 1].
        high: The greatest.
        size: For images of files: the side, in pixels, of the square that each is resized and cut to. By default they must
            all have the same size.

    Raises:
        UsageError: There is no such data or split, or it cannot be read or is not labelled inputs.

    >>> data = load("mnist-5k", limit=20)
    >>> data.batch(0, 20)[0].shape, data.y.bincount().tolist()
    (torch.Size([20, 1, 28, 28]), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    if size is not None:
        check_at_least("the size", size, 1)
    if spec.startswith("strings:"):
        return strings(load(spec.removeprefix("strings:"), split=split, low=low, high=high, size=size)).limited(limit, seed)
    encoded = _encoded(spec)
    if encoded:
        return encoded(spec, split).load(limit, seed, low, high, size)
    arrays = _arrays(spec)
    if size is not None:
        raise UsageError(f"{spec} holds arrays, which are not resized; leave --size out (in Python, size=)")
    return dataclasses.replace(arrays(spec, split, low, high), name=spec).limited(limit, seed)


def _encoded(spec: str) -> Callable[[str, str], Pictures | Sounds] | None:
    """What reads a source of image or sound files; None for other sources."""
    if spec.startswith("hf:"):
        return huggingface.encoded
    source, column, _ = huggingface.held_out(spec)
    path = Path(source).expanduser()
    if spec in ("", "mnist-5k") or not path.is_dir():
        return None
    if huggingface.is_parquet(path):
        return huggingface.encoded
    if column:
        raise UsageError(f"{source} holds no Parquet files and so has no column {column!r}; leave out what follows @")
    return folder.encoded


def _arrays(spec: str) -> Callable[[str, str, float | None, float | None], Data]:
    """What reads a source of arrays."""
    if spec == "mnist-5k":
        return lambda _, split, low, high: mnist_5k(split, low, high)
    if is_python(spec):
        return read_python
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return read_npz
    if path.suffix == ".safetensors":
        return read_generated
    raise _unknown(spec, path)


def _unknown(spec: str, path: Path) -> UsageError:
    if path.suffix == ".py":
        return UsageError(f"{spec!r} is a file of Python; name the function in it that gives the data, as in {spec}:load")
    if path.is_file():
        return UsageError(f"cannot read {spec!r}; a file of data is an .npz, or a .py with a function: file.py:function")
    if path.suffix == ".npz" or spec.startswith((".", "/", "~")):
        return UsageError(f"there is no file or folder {spec!r}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", spec):
        return UsageError(f"there is no folder {spec!r}; for the data set of the Hugging Face hub, write hf:{spec}")
    return unknown("data", spec, DATA)
