"""Random views: an image turned, printed, photographed, compressed, a sound in a room. What a physical attack has to survive.

A transform is called with images x in [0, 1], with shape (M, C, H, W), the random streams, and the numbers of the rows that
the images belong to, with shape (M,). Its result has the shape and range of x, depends on an image's own row only, and is
differentiable in x. Those of sounds, for waveforms (M, T) in [-1, 1], are in ``advkit.sound``. The mean over such views is
what an attack in the physical world maximizes (Athalye, Engstrom, Ilyas and Kwok, 2018, "Synthesizing robust adversarial
examples", https://arxiv.org/abs/1707.07397).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit import spec
from advkit.errors import UsageError
from advkit.sound.air import AIR, at
from advkit.sound.codecs import CODECS
from advkit.sound.filters import FILTERS
from advkit.streams import Streams


class Transform(Protocol):
    """A random change of images, or of sounds; frozen data."""

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """``x`` as seen this time, with its shape."""


def _check_images(name: str, x: Tensor) -> None:
    if x.ndim != 4:
        raise UsageError(f"{name} changes images (N, C, H, W); the inputs have shape {tuple(x.shape)}")


def _spread(rng: Streams, rows: Tensor, x: Tensor, n: int) -> Tensor:
    """Uniform in [-1, 1], n numbers for each row in the dtype of x, with shape (n, M)."""
    return (2 * rng.uniform(n, rows=rows, dtype=x.dtype) - 1).T


def _warped(x: Tensor, matrix: Tensor) -> Tensor:
    """The image whose pixel at p shows x at matrix @ (p, 1), in units of half the height; beyond its edge, x's edge goes on.

    Arguments:
        x: Images, with shape (M, C, H, W).
        matrix: A projective map for each, with shape (M, 3, 3).
    """
    h, w = x.shape[-2:]
    # In units that are as long across as down, so that a turn is a turn.
    wide = w / h
    across = (torch.arange(w, dtype=x.dtype, device=x.device) + 0.5) * 2 / h - wide
    down = (torch.arange(h, dtype=x.dtype, device=x.device) + 0.5) * 2 / h - 1
    points = torch.stack([across.expand(h, w), down.unsqueeze(1).expand(h, w), torch.ones_like(x[0, 0])], 2).flatten(0, 1)
    source = points @ matrix.mT
    place = source[..., :2] / source[..., 2:] / torch.tensor([wide, 1.0], dtype=x.dtype, device=x.device)
    return F.grid_sample(x, place.view(len(x), h, w, 2), padding_mode="border", align_corners=False)


def _matrix(entries: list[list[Tensor | float]], like: Tensor) -> Tensor:
    """A matrix for each row from its entries, each a number or (M,), with shape (M, 3, 3)."""
    full = [[torch.as_tensor(e, dtype=like.dtype, device=like.device).expand(len(like)) for e in line] for line in entries]
    return torch.stack([torch.stack(line, 1) for line in full], 1)


@dataclass(frozen=True)
class Rotate:
    """Turned about the centre by an angle uniform in [-degrees, degrees].

    Arguments:
        degrees: The greatest angle.
    """

    degrees: float = 30.0

    def __post_init__(self) -> None:
        spec.check_at_least("rotate: degrees", self.degrees, 0)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The turned images, bilinearly interpolated."""
        _check_images("rotate", x)
        angle = math.radians(self.degrees) * _spread(rng, rows, x, 1)[0]
        cos, sin = angle.cos(), angle.sin()
        return _warped(x, _matrix([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], x))


@dataclass(frozen=True)
class Scale:
    """Enlarged about the centre by a factor uniform in [least, most], and cut or filled to its size.

    Arguments:
        least: The least factor, greater than 0.
        most: The greatest.
    """

    least: float = 0.8
    most: float = 1.2

    def __post_init__(self) -> None:
        spec.check_positive("scale: least", self.least)
        spec.check_at_least("scale: most", self.most, self.least)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The scaled images, bilinearly interpolated."""
        _check_images("scale", x)
        u = rng.uniform(1, rows=rows, dtype=x.dtype)[:, 0]
        shrink = 1 / (self.least + (self.most - self.least) * u)
        return _warped(x, _matrix([[shrink, 0.0, 0.0], [0.0, shrink, 0.0], [0.0, 0.0, 1.0]], x))


@dataclass(frozen=True)
class Perspective:
    """Seen from the side: each corner of the image moves by up to ``strength`` of half its side, across and down.

    Arguments:
        strength: The greatest move, in [0, 1).
    """

    strength: float = 0.2

    def __post_init__(self) -> None:
        spec.check_share("perspective: strength", self.strength)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The distorted images, bilinearly interpolated."""
        _check_images("perspective", x)
        wide = x.shape[-1] / x.shape[-2]
        corner = torch.tensor([[-wide, -1.0], [wide, -1.0], [wide, 1.0], [-wide, 1.0]], dtype=x.dtype, device=x.device)
        moves = _spread(rng, rows, x, 8).T.reshape(-1, 4, 2) * torch.tensor([wide, 1.0], dtype=x.dtype, device=x.device)
        return _warped(x, _homography(corner.expand_as(moves), corner + self.strength * moves))


def _homography(old: Tensor, new: Tensor) -> Tensor:
    """The projective map that takes four points (M, 4, 2) to four others, with shape (M, 3, 3).

    With a, b the old and u, v the new coordinates, u (g a + h b + 1) = c a + d b + e, and v likewise, are eight equations.
    """
    a, b = old.unbind(2)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    u, v = new.unbind(2)
    for_u = torch.stack([a, b, one, zero, zero, zero, -u * a, -u * b], 2)
    for_v = torch.stack([zero, zero, zero, a, b, one, -v * a, -v * b], 2)
    entries = torch.linalg.solve(torch.cat([for_u, for_v], 1), torch.cat([u, v], 1))
    return torch.cat([entries, one[:, :1]], 1).view(-1, 3, 3)


@dataclass(frozen=True)
class Brightness:
    """(1 + c) * (x - 1/2) + 1/2 + b, cut to [0, 1], with b and c uniform in [-most, most] and [-contrast, contrast].

    Arguments:
        most: The greatest change of brightness, in [0, 1).
        contrast: The greatest change of contrast, in [0, 1).
    """

    most: float = 0.2
    contrast: float = 0.2

    def __post_init__(self) -> None:
        spec.check_share("brightness: most", self.most)
        spec.check_share("brightness: contrast", self.contrast)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The images in another light; inputs of any shape."""
        b, c = (u.view(-1, *(1,) * (x.ndim - 1)) for u in _spread(rng, rows, x, 2))
        return ((1 + self.contrast * c) * (x - 0.5) + 0.5 + self.most * b).clamp(0, 1)


@dataclass(frozen=True)
class Blur:
    """Out of focus: convolved with a Gaussian whose deviation is uniform in [0, sigma].

    Arguments:
        sigma: The greatest deviation, in pixels.
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        spec.check_positive("blur: sigma", self.sigma)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The blurred images; beyond the edge nothing is weighed."""
        _check_images("blur", x)
        # A deviation of 0 would divide by it; one of a tenth of a pixel changes nothing.
        sigma = (self.sigma * rng.uniform(1, 1, rows=rows, dtype=x.dtype)).clamp(min=0.1)
        down, across = (_gaussian(n, sigma).unsqueeze(1) for n in x.shape[-2:])
        return down @ x @ across.mT


def _gaussian(n: int, sigma: Tensor) -> Tensor:
    """Weights of a Gaussian around each of n entries, each line summing to 1; for sigma (M, 1, 1), with shape (M, n, n)."""
    index = torch.arange(n, dtype=sigma.dtype, device=sigma.device)
    weights = torch.exp(-0.5 * ((index.unsqueeze(1) - index) / sigma).square())
    return weights / weights.sum(2, keepdim=True)


@dataclass(frozen=True)
class Print:
    """Printed and scanned: inks that are neither black nor white, each channel its own, and grain.

    Arguments:
        gamut: The greatest share of the range that is lost at either end, in [0, 0.5).
        noise: The deviation of the grain, normal, for each entry.
    """

    gamut: float = 0.1
    noise: float = 0.03

    def __post_init__(self) -> None:
        spec.check_share("print: gamut", 2 * self.gamut)
        spec.check_at_least("print: noise", self.noise, 0)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The printed images; inputs of any shape, whose second axis is the channels."""
        ends = rng.uniform(2, x.shape[1], rows=rows, dtype=x.dtype) * self.gamut
        black, white = (end.view(*end.shape, *(1,) * (x.ndim - 2)) for end in ends.unbind(1))
        grain = self.noise * rng.normal(*x.shape[1:], rows=rows, dtype=x.dtype)
        return (black + (1 - black - white) * x + grain).clamp(0, 1)


LUMINANCE = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""
CHROMINANCE = """
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99
"""
"""The quantization tables of annex K of the standard (ITU-T T.81, 1992), line by line, for quality 50."""
TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


@dataclass(frozen=True)
class JPEG:
    """Saved as JPEG and read back, with colours at half the resolution; the gradient passes rounding as if it were not there.

    Shin and Song, 2017, "JPEG-resistant adversarial images"; their smooth rounding is replaced by the rounding itself, with
    the gradient of the identity, so that what the model sees is what it would see in the file. The mean difference from
    Pillow's files is below 1/255. A single pixel can differ by tens of levels, up to 40/255 at quality 50 on noise, where a
    coefficient halfway between two steps is rounded the other way. Images that do not have three channels are saved as one
    grey image a channel.

    Arguments:
        quality: From 1 to 100, as in Pillow and libjpeg.
    """

    quality: int = 75

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UsageError(f"jpeg: quality is {self.quality}; it should be from 1 to 100")

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The images as read back; nothing is drawn."""
        _check_images("jpeg", x)
        levels = _rounded(255 * x)
        if x.shape[1] != 3:
            grey = self._coded(levels.flatten(0, 1).unsqueeze(1), LUMINANCE).view_as(x)
            return (grey / 255).clamp(0, 1)
        ycc = _rounded(torch.einsum("ij,mjhw->mihw", levels.new_tensor(TO_YCC), levels))
        light = self._coded(ycc[:, :1], LUMINANCE)
        mean = F.avg_pool2d(_padded(ycc[:, 1:], 2), 2)
        # As libjpeg: means halfway between two levels go down and up in turn.
        half = _rounded(mean - 0.125 + 0.25 * (torch.arange(mean.shape[3], device=x.device) % 2))
        colour = self._coded(half.flatten(0, 1).unsqueeze(1), CHROMINANCE, offset=0.0).view_as(half)
        full = F.interpolate(colour, scale_factor=2, mode="bilinear", align_corners=False)[..., : x.shape[2], : x.shape[3]]
        rgb = torch.einsum("ij,mjhw->mihw", levels.new_tensor(TO_RGB), torch.cat([light, _rounded(full)], 1))
        return (_rounded(rgb) / 255).clamp(0, 1)

    def _coded(self, plane: Tensor, table: str, offset: float = 128.0) -> Tensor:
        """Planes (M, 1, H, W) through the discrete cosine transform of 8 x 8 blocks, rounded to the table's steps."""
        base = torch.tensor([float(step) for step in table.split()], dtype=plane.dtype, device=plane.device).view(8, 8)
        percent = 5000 // self.quality if self.quality < 50 else 200 - 2 * self.quality
        steps = ((base * percent + 50) / 100).floor().clamp(1, 255)
        h, w = plane.shape[-2:]
        blocks = _padded(plane, 8) - offset
        m, _, high, wide = blocks.shape
        blocks = blocks.view(m, high // 8, 8, wide // 8, 8).transpose(2, 3)
        dct = _dct(plane)
        coded = dct.T @ (_rounded(dct @ blocks @ dct.T / steps, 1e-4) * steps) @ dct
        level = _rounded(coded.transpose(2, 3).reshape(m, 1, high, wide)[..., :h, :w] + offset)
        return level.clamp(offset - 128, offset + 127)


def _rounded(x: Tensor, slack: float = 0.0) -> Tensor:
    """``x`` rounded, what is halfway up to ``slack`` away from 0, with the gradient of x."""
    whole = x.detach()
    return x + (whole.sign() * (whole.abs() + 0.5 + slack).floor() - whole)


def _padded(plane: Tensor, n: int) -> Tensor:
    """Planes with their last line and column repeated up to a multiple of n."""
    h, w = plane.shape[-2:]
    return F.pad(plane, (0, -w % n, 0, -h % n), mode="replicate")


def _dct(like: Tensor) -> Tensor:
    """The orthonormal discrete cosine transform of eight numbers, with shape (8, 8)."""
    k = torch.arange(8, dtype=torch.float64)
    rows = torch.cos(math.pi / 8 * k.unsqueeze(1) * (k + 0.5)) / 2
    rows[0] /= math.sqrt(2)
    return rows.to(like)


@dataclass(frozen=True)
class Chain:
    """Several transforms, one after the other.

    Arguments:
        parts: The transforms.
    """

    parts: tuple[Any, ...]

    @property
    def sound(self) -> bool:
        """Whether they change sounds, in [-1, 1], and not images, in [0, 1]."""
        return type(self.parts[0]) in SOUNDS.values()

    def at(self, rate: int) -> Chain:
        """The same for sounds of another rate, in samples a second."""
        return Chain(tuple(at(part, rate) for part in self.parts))

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The inputs after all of them."""
        for part in self.parts:
            x = part(x, rng, rows)
        return x


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "rotate": Rotate,
    "scale": Scale,
    "perspective": Perspective,
    "brightness": Brightness,
    "blur": Blur,
    "print": Print,
    "jpeg": JPEG,
}
"""The transforms of images that a view may name."""

SOUNDS: dict[str, Callable[..., Any]] = {**AIR, **CODECS, **FILTERS}
"""Those of sounds."""

_PLUS = re.compile(r"\+(?![^(]*\))")


def view(text: str) -> Chain:
    """The transform that a text names: one or several of a table joined by ``+``, in the order in which they happen.

    The first name says whether it is a view of images or of sounds.

    Raises:
        UsageError: The text is not of this form, or a name or a setting is unknown or has a wrong value.

    >>> view("rotate(30)+jpeg(70)")
    Chain(parts=(Rotate(degrees=30.0), JPEG(quality=70)))
    >>> view("room+noise(10)").sound
    True
    """
    parts = _PLUS.split(text)
    first = parts[0].partition("(")[0].strip()
    known = next((table for table in (TRANSFORMS, SOUNDS) if first in table), TRANSFORMS | SOUNDS)
    return Chain(tuple(spec.parse(part, known, "transform") for part in parts))
