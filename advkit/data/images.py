"""Encoded images with labels: what a folder and a data set of the hub have in common.

Images have one channel where all of them are grey, and three otherwise. They stay as they are stored: neither transparency
nor the orientation that a camera noted is applied, as in torchvision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from advkit.data.dataset import Data, check_labels, check_range, spread, spread_notes, stratified
from advkit.errors import UsageError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

GREY = ("1", "L", "LA", "La")
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
HELD = 1 << 30
"""The most bytes of pixels that are held in memory."""
BLOCK = 1 << 16


@dataclass(frozen=True)
class Form:
    """What each image is made into.

    Arguments:
        channels: 1 for grey, 3 for colour.
        width: In pixels.
        height: In pixels.
        crop: Whether images are resized, so that the shorter side fits, and cut to the centre; otherwise they have this size.
        deep: Whether there are images of 16 bits, which are reduced to 8.
    """

    channels: int
    width: int
    height: int
    crop: bool
    deep: bool

    def pixels(self, image: Image, where: str) -> Any:
        """The pixels, with shape (height, width, channels) and dtype uint8.

        Raises:
            UsageError: The image has another size.
        """
        if image.mode in GREY_16:
            image = _reduced(image)
        image.info.pop("transparency", None)  # PIL would warn that it is lost
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.crop:
            image = _cropped(image, self.width)
        if image.size != (self.width, self.height):
            raise _sizes(where, image.size, "the others", (self.width, self.height))
        return np.asarray(image).reshape(self.height, self.width, self.channels)


@dataclass(frozen=True)
class Pictures:
    """Encoded images with labels, not read yet.

    Arguments:
        name: Of the data.
        y: The labels, with shape (N,) and dtype int64.
        streams: Numbers of examples, with shape (M,), to their files, opened one by one in this order.
        where: What to call an example in a message.
        classes: The names of the labels.
        notes: What was inferred about them.
        hold: Whether to decode at once what fits in memory; otherwise images are decoded when they are asked for.
    """

    name: str
    y: Tensor
    streams: Callable[[Tensor], Iterator[IO[bytes]]]
    where: Callable[[int], str]
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    hold: bool

    def load(self, limit: int | None, seed: int, low: float | None, high: float | None, size: int | None) -> Data:
        """The data, as :func:`advkit.data.load` describes; only examples within the limit are looked at.

        Raises:
            UsageError: An image cannot be read, or images have different sizes and ``size`` is None.
        """
        if not len(self.y):
            raise UsageError(f"{self.name} has no examples; there should be at least one")
        check_labels(self.y, self.classes)
        bounds = check_range(low, high) or (0.0, 1.0)
        index = stratified(self.y, limit, seed)
        form = self.survey(index, size)
        bytes_held = len(index) * form.channels * form.height * form.width
        decode = self.held(index, form) if self.hold and bytes_held < HELD else lambda numbers: self.decode(numbers, form)
        return Data(
            name=self.name,
            y=self.y[index],
            take=lambda numbers: spread(decode(numbers), *bounds),
            low=bounds[0],
            high=bounds[1],
            kind="image",
            index=index,
            fingerprint=lambda numbers: self.sha256(numbers, form),
            classes=self.classes,
            levels=255,
            notes=(*self.notes, *_reduced_notes(form), *spread_notes(*bounds)),
        )

    def survey(self, index: Tensor, size: int | None) -> Form:
        """What to make of the images numbered ``index``, from their headers."""
        modes, first = set(), None
        for number, image in self.opened(index):
            modes.add(image.mode)
            first = first or (self.where(number), image.size)
            if size is None and image.size != first[1]:
                raise _sizes(*first, self.where(number), image.size)
            if size is not None and not modes.isdisjoint(COLOUR):
                break
        assert first is not None
        width, height = first[1] if size is None else (size, size)
        channels = 3 if not modes.isdisjoint(COLOUR) else 1
        return Form(channels, width, height, crop=size is not None, deep=not modes.isdisjoint(GREY_16))

    def opened(self, index: Tensor) -> Iterator[tuple[int, Image]]:
        """The images numbered ``index``, with their numbers; only an image's header has been read."""
        from PIL import Image

        for number, stream in zip(index.tolist(), self.streams(index), strict=True):
            with stream:
                try:
                    image = Image.open(stream)
                except Exception as error:  # damaged files raise almost anything
                    raise self._unreadable(number, error) from error
                if image.mode not in (*GREY, *GREY_16, *COLOUR):
                    raise UsageError(f"{self.where(number)} is of mode {image.mode}; images should be grey or RGB, of 8 bits")
                yield number, image

    def decode(self, index: Tensor, form: Form) -> Tensor:
        """The pixels, with shape (M, C, H, W) and dtype uint8."""
        pixels = np.empty((len(index), form.height, form.width, form.channels), np.uint8)
        for i, (number, image) in enumerate(self.opened(index)):
            try:
                pixels[i] = form.pixels(image, self.where(number))
            except UsageError:
                raise
            except Exception as error:
                raise self._unreadable(number, error) from error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def held(self, index: Tensor, form: Form) -> Callable[[Tensor], Tensor]:
        """A function like ``decode`` for the images numbered ``index``, in ascending order, which are decoded now."""
        pixels = self.decode(index, form)

        def decode(numbers: Tensor) -> Tensor:
            rows = torch.searchsorted(index, numbers).clamp(max=len(index) - 1)
            if not torch.equal(index[rows], numbers):
                raise UsageError(f"not all of these examples of {self.name} were loaded; ask for numbers among those of index")
            return pixels[rows]

        return decode

    def sha256(self, index: Tensor, form: Form) -> str:
        """Of the encoded images, and of what is made of them."""
        sha = hashlib.sha256(f"{form.channels} {form.height} {form.width} {form.crop}".encode())
        for stream in self.streams(index):
            with stream:
                size = 0
                while block := stream.read(BLOCK):
                    sha.update(block)
                    size += len(block)
                sha.update(size.to_bytes(8, "little"))
        return sha.hexdigest()

    def _unreadable(self, number: int, error: Exception) -> UsageError:
        from PIL import UnidentifiedImageError

        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else first_line(error)
        return UsageError(f"cannot read {self.where(number)} as an image: {reason}")


def _sizes(where: str, size: tuple[int, int], other_where: str, other: tuple[int, int]) -> UsageError:
    sizes = f"{where} has {size[0]} x {size[1]} pixels, {other_where} {other[0]} x {other[1]}"
    return UsageError(f"{sizes}; give --size to resize all to one size (in Python, size=)")


def _reduced(image: Image) -> Image:
    """16 bits to 8; PIL's own conversion would clip."""
    from PIL import Image

    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def _reduced_notes(form: Form) -> tuple[str, ...]:
    return ("images of 16 bits were reduced to 8 bits",) if form.deep else ()


def _cropped(image: Image, size: int) -> Image:
    """The centre square, after the shorter side became ``size`` pixels."""
    from PIL import Image

    width, height = image.size
    shorter = min(width, height)
    image = image.resize((size * width // shorter, size * height // shorter), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
