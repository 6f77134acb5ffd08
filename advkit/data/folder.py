"""A folder with a folder of images, or of sounds, for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from advkit.data.images import Pictures
from advkit.data.sounds import Sounds
from advkit.errors import UsageError

IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


def encoded(path: str, split: str) -> Pictures | Sounds:
    """The images or sounds of ``path/<split>/<class>/``, or of ``path/<class>/`` where there is no folder of the split.

    Classes and files are in alphabetical order, as in torchvision; names that start with a dot are left out.

    Raises:
        UsageError: There is no image or sound there, or there are both.
    """
    root = Path(path).expanduser()
    top = root / split if (root / split).is_dir() else root
    classes = sorted(entry.name for entry in os.scandir(top) if entry.is_dir() and not entry.name.startswith("."))
    files = [(label, file) for label, name in enumerate(classes) for file in _files(top / name)]
    loud = [file.lower().endswith(SOUNDS) for _, file in files]
    if not files:
        found = f"it has the folders {', '.join(classes[:10])}" if classes else "it has no folders"
        should = f"it should have a folder of images or of sounds for each class, or a folder {split!r} with these"
        raise UsageError(f"there is no image one folder below {top}; {found}, and {should}")

    if any(loud) and not all(loud):
        found = f"{sum(loud)} of {len(loud)} files one folder below {top} are sounds and the rest images"
        raise UsageError(f"{found}; there should be one kind")

    def streams(index: Tensor) -> Iterator[IO[bytes]]:
        for number in index.tolist():
            yield _opened(files[number][1])

    source = Sounds if any(loud) else partial(Pictures, hold=False)
    return source(
        name=path,
        y=torch.tensor([label for label, _ in files]),
        streams=streams,
        where=lambda number: files[number][1],
        classes=tuple(classes),
        notes=(),
    )


def _files(folder: Path) -> list[str]:
    """The paths of the images and sounds; strings, of which a million take little memory."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGES + SOUNDS))
    return [os.path.join(folder, name) for name in names if not name.startswith(".")]


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"cannot open {path}: {error.strerror}") from error
