"""Data sets of the Hugging Face hub, or in its layout in a local folder; the only data that are ever downloaded."""

from __future__ import annotations

import contextlib
import functools
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
from advkit.data.sounds import Sounds
from advkit.errors import UsageError, first_line

LABELS = ("label", "labels", "y", "fine_label")
ROWS = 1024


def is_parquet(folder: Path) -> bool:
    """Whether a folder holds Parquet files, at its top or one folder down, as on the hub."""
    return any(True for pattern in ("*.parquet", "*/*.parquet") for _ in folder.glob(pattern))


def encoded(spec: str, split: str) -> Pictures | Sounds:
    """The images or sounds of a data set.

    Arguments:
        spec: ``hf:org/name`` or ``hf:org/name@config``, which may be downloaded, or a local folder; with ``@column=value`` at
            the end, other splits are made of all examples: ``test`` has those with the value, ``train`` the others.
        split: Of the data set.

    Raises:
        UsageError: The package ``datasets`` is missing, there is no such data set or split, or it has no images or sounds, or
            no labels.
    """
    source, column, value = held_out(spec)
    splits = _load(spec, *(_parsed(source) if spec.startswith("hf:") else (str(Path(source).expanduser()), None)))
    if column:
        splits = _regrouped(spec, splits, column, value)
    if split not in splits:
        raise UsageError(f"{spec} has no split {split!r}; it has {', '.join(splits)}")
    rows = splits[split]
    content, label = _content_column(spec, rows.features), _label_column(spec, rows.features)
    stored = _stored(rows, content)

    def streams(index: Tensor) -> Iterator[IO[bytes]]:
        for some in index.split(ROWS):
            for one in stored[some.tolist()][content].to_pylist():
                yield _opened(one)

    make = Sounds if _is_sound(rows.features[content]) else functools.partial(Pictures, hold=True)
    return make(
        name=spec,
        y=_labels(rows, label, spec),
        streams=streams,
        where=lambda number: f"example {number} of {spec}",
        classes=tuple(getattr(rows.features[label], "names", None) or ()),
        notes=_notes(spec, label, rows.features),
    )


def held_out(spec: str) -> tuple[str, str, str]:
    """The data set, the column and the value of ``SPEC@column=value``; both are empty where nothing is held out."""
    found = re.fullmatch(r"(.+)@(\w+)=(.+)", spec)
    return (found[1], found[2], found[3]) if found else (spec, "", "")


def _regrouped(spec: str, splits: Any, column: str, value: str) -> dict[str, Any]:
    """All examples as two splits: those whose column has the value, and the others."""
    import datasets

    rows = datasets.concatenate_datasets(list(splits.values()))
    if column not in rows.features:
        raise UsageError(f"{spec} has no column {column!r}; its columns are {', '.join(rows.features)}")
    values = [str(one) for one in rows.select_columns(column).with_format("arrow")[:][column].to_pylist()]
    if value not in values or set(values) == {value}:
        some = ", ".join(sorted(set(values))[:10])
        raise UsageError(f"no split can be made where {column} is {value!r}; some examples should have the value, of {some}")
    of = [[i for i, one in enumerate(values) if (one == value) == held] for held in (False, True)]
    return {"train": rows.select(of[0]), "test": rows.select(of[1])}


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


def _stored(rows: Any, content: str) -> Any:
    """The column of images or sounds alone, with the bytes of the files in place of pixels or samples."""
    import datasets

    kind = datasets.Audio if _is_sound(rows.features[content]) else datasets.Image
    return rows.select_columns(content).cast_column(content, kind(decode=False)).with_format("arrow")


def _is_sound(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Audio)


def _opened(stored: dict[str, Any] | None) -> IO[bytes]:
    """An image or a sound of a data set: in it, or in a file beside it; empty where it is missing."""
    if stored is None or stored["bytes"] is not None:
        return io.BytesIO(stored["bytes"] if stored else b"")
    return Path(stored["path"]).open("rb")


def _content_column(spec: str, features: Any) -> str:
    """The column of images, or else that of sounds."""
    import datasets

    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    columns = columns or [name for name, feature in features.items() if _is_sound(feature)]
    if not columns:
        should = "one should hold images or sounds"
        raise UsageError(f"{spec} has no column of images; its columns are {', '.join(features)}, and {should}")
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
