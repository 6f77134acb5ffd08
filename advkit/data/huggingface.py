"""Data sets of the Hugging Face hub, or in its layout in a local folder; the only data that are ever downloaded."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from advkit.data.images import Pictures
from advkit.errors import UsageError, first_line

LABELS = ("label", "labels", "y", "fine_label")
ROWS = 1024


def is_parquet(folder: Path) -> bool:
    """Whether a folder holds Parquet files, at its top or one folder down, as on the hub."""
    return any(True for pattern in ("*.parquet", "*/*.parquet") for _ in folder.glob(pattern))


def pictures(spec: str, split: str) -> Pictures:
    """The images of a data set.

    Arguments:
        spec: ``hf:org/name`` or ``hf:org/name@config``, which may be downloaded, or a local folder.
        split: Of the data set.

    Raises:
        UsageError: The package ``datasets`` is missing, there is no such data set or split, or it has no images and labels.
    """
    splits = _load(spec, *(_parsed(spec) if spec.startswith("hf:") else (str(Path(spec).expanduser()), None)))
    if split not in splits:
        raise UsageError(f"{spec} has no split {split!r}; it has {', '.join(splits)}")
    rows = splits[split]
    image, label = _image_column(spec, rows.features), _label_column(spec, rows.features)
    encoded = _encoded(rows, image)

    def streams(index: Tensor) -> Iterator[IO[bytes]]:
        for some in index.split(ROWS):
            for stored in encoded[some.tolist()][image].to_pylist():
                yield _opened(stored)

    return Pictures(
        name=spec,
        y=_labels(rows, label, spec),
        streams=streams,
        where=lambda number: f"example {number} of {spec}",
        classes=tuple(getattr(rows.features[label], "names", None) or ()),
        notes=_notes(spec, label, rows.features),
        hold=True,
    )


def _parsed(spec: str) -> tuple[str, str | None]:
    """The name and the configuration in ``hf:org/name@config``."""
    found = re.fullmatch(r"hf:(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(.+))?", spec)
    if not found:
        raise UsageError(f"{spec!r} names no data set of the Hugging Face hub; write hf:org/name or hf:org/name@config")
    return found[1], found[2]


def _load(spec: str, name: str, config: str | None) -> Any:
    """The splits by name."""
    # Read by the hub's client when it is first imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f'{spec} needs the package datasets; install it with pip install "advkit[hf]"') from error
    try:
        with _quiet(datasets):
            return datasets.load_dataset(name, config)
    except Exception as error:  # of the network, the hub, its client, Arrow and the file system
        raise UsageError(f"cannot load {spec}: {type(error).__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars meanwhile."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _encoded(rows: Any, image: str) -> Any:
    """The image column alone, with the bytes of the files in place of pixels."""
    import datasets

    return rows.select_columns(image).cast_column(image, datasets.Image(decode=False)).with_format("arrow")


def _opened(stored: dict[str, Any] | None) -> IO[bytes]:
    """An image of a data set: in it, or in a file beside it; empty where it is missing."""
    if stored is None or stored["bytes"] is not None:
        return io.BytesIO(stored["bytes"] if stored else b"")
    return Path(stored["path"]).open("rb")


def _image_column(spec: str, features: Any) -> str:
    import datasets

    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UsageError(f"{spec} has no column of images; its columns are {', '.join(features)}")
    return next((name for name in columns if name in ("image", "img")), columns[0])


def _label_columns(features: Any) -> list[str]:
    """The columns that can be labels, the likely ones first."""
    import datasets

    usual = [name for name in LABELS if name in features]
    declared = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    integers = [name for name in usual if "int" in str(getattr(features[name], "dtype", ""))]
    return [name for name in dict.fromkeys([*usual, *declared]) if name in declared or name in integers]


def _label_column(spec: str, features: Any) -> str:
    columns = _label_columns(features)
    if not columns:
        raise UsageError(f"{spec} has no column of labels; its columns are {', '.join(features)}, and one should be ClassLabel")
    return columns[0]


def _notes(spec: str, label: str, features: Any) -> tuple[str, ...]:
    others = [name for name in _label_columns(features) if name != label]
    return (f"the labels of {spec} were taken from column {label!r}, not from {', '.join(others)}",) if others else ()


def _labels(rows: Any, name: str, spec: str) -> Tensor:
    column = rows.select_columns(name).with_format("arrow")[:][name]
    if column.null_count:
        raise UsageError(f"{column.null_count} of {len(column)} labels of {spec} are missing; each example should have one")
    return torch.from_numpy(np.array(column.to_numpy(), dtype=np.int64))
