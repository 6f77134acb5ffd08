"""Changes of an image that are no small sum: it is turned, bent, coloured, or covered in part.

Symbols: x is an image with height H and width W, theta the parameters of a change. The adversary searches theta, and what is
allowed is a ball of theta.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.ball import Lp
from advkit.errors import UsageError
from advkit.spec import check_at_least, check_choice, check_positive

BORDERS = {"black": "the least value of the data", "edge": "the closest pixel of the edge"}
"""What an image is continued with beyond its edge."""
LUMA = (0.299, 0.587, 0.114)
"""How bright red, green and blue seem (ITU-R BT.601)."""


class _Ranged:
    """What the changes have in common; a dataclass with fields low and high."""

    low: float
    high: float

    def _check_range(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise UsageError(f"the range is [{self.low}, {self.high}]; a change needs finite numbers, low less than high")

    @property
    def span(self) -> float:
        """High - low."""
        return self.high - self.low

    def _shown(self) -> Lp:
        """Which inputs are allowed, whatever theta is."""
        return Lp(math.inf, math.inf, self.low, self.high)

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which rows are finite and in the range, with shape (N,); theta's ball says the rest."""
        return self._shown().allows(x_adv, x)

    def snap(self, x_adv: Tensor, x: Tensor, levels: int, outward: bool = False) -> Tensor:
        """``x_adv`` on the grid of ``levels`` equal steps from low to high, with shape (N, *): the nearest values.

        With ``outward`` the next values away from x. Rounding never leaves the threat model, unless there is a radius.
        """
        return self._shown().snap(x_adv, x, levels, outward)


class _Few(_Ranged):
    """A change with a few numbers for a whole image, each from -1 to 1 times a limit; what has the limit 0 is left out."""

    eps = 1.0

    def _limits(self, channels: int) -> dict[str, float]:
        """All limits, in the order of theta's entries."""
        raise NotImplementedError

    @property
    def ball(self) -> Lp:
        """Theta in [-1, 1]."""
        return Lp(math.inf, 1.0, -1.0, 1.0)

    def zero(self, x: Tensor) -> Tensor:
        """Zeros, one a limit, with shape (N, P)."""
        size = sum(limit > 0 for limit in self._limits(check_images(x)).values())
        if not size:
            raise UsageError(f"{self} has no limit greater than 0 that applies to images of {x.shape[1]} channels")
        return x.new_zeros(len(x), size)

    def _amounts(self, x: Tensor, theta: Tensor) -> Iterator[Tensor]:
        """Each limit times its entry of theta, or 0 where it has none, with shape (N, 1, 1)."""
        entries = iter(theta.unbind(1))
        for limit in self._limits(x.shape[1]).values():
            amount = limit * next(entries) if limit else theta.new_zeros(len(theta))
            yield amount.view(-1, 1, 1)


def check_images(x: Tensor) -> int:
    """How many channels images have.

    Raises:
        UsageError: The inputs are not images.
    """
    if x.ndim != 4:
        raise UsageError(f"the inputs have shape {tuple(x.shape)}; this threat model changes images, (N, C, H, W)")
    return x.shape[1]


@dataclass(frozen=True)
class Rotation(_Few):
    r"""The image turned about its centre by theta_1 * angle, then moved by theta_2 * shift * W and theta_3 * shift * H.

    Engstrom, Tran, Tsipras, Schmidt and Madry, 2019, "Exploring the landscape of spatial robustness",
    https://arxiv.org/abs/1712.02779. Between pixels the image is linear. Positive angles turn as ``torch.rot90`` does,
    positive shifts are to the right and down. With ``scale`` the image also grows by the factor 1 + theta_4 * scale.

    Arguments:
        angle: The greatest angle, in degrees.
        shift: The greatest shift, as a share of the image's side.
        scale: The greatest growth, as a share, less than 1.
        border: What comes in from outside: ``black`` (low) or ``edge`` (the closest pixel).
        low: The least value the data may have.
        high: The greatest.

    Raises:
        UsageError: A limit that is negative or too large, or an empty or infinite range.

    >>> image = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    >>> Rotation(angle=90, border="edge").apply(image, torch.tensor([[1.0, 0.0, 0.0]])).round().tolist()
    [[[[1.0, 0.0], [0.0, 0.0]]]]
    """

    angle: float = 30.0
    shift: float = 0.1
    scale: float = 0.0
    border: str = "black"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        check_choice("rotation: border", self.border, BORDERS)
        for name in ("angle", "shift", "scale"):
            check_at_least(f"rotation: {name}", getattr(self, name), 0)
        if self.scale >= 1:
            raise UsageError(f"rotation: scale is {self.scale}; it should be less than 1")

    def _limits(self, channels: int) -> dict[str, float]:
        return {"angle": math.radians(self.angle), "right": self.shift, "down": self.shift, "scale": self.scale}

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """The images, with shape (N, C, H, W)."""
        height, width = x.shape[-2:]
        angle, to_right, to_bottom, growth = self._amounts(x, theta)
        cos, sin = angle.cos(), angle.sin()
        # Each pixel is taken from where the inverse of the change puts it.
        down = (_centred(height, x).view(-1, 1) - height * to_bottom) / (1.0 + growth)
        right = (_centred(width, x) - width * to_right) / (1.0 + growth)
        rows = down * cos + right * sin + (height - 1) / 2
        columns = right * cos - down * sin + (width - 1) / 2
        if self.border == "edge":
            return _between(x, rows, columns)
        return _between(F.pad(x, (1, 1, 1, 1), value=self.low), rows + 1, columns + 1)


def _centred(n: int, like: Tensor) -> Tensor:
    """The places of n pixels from their centre, with shape (n,)."""
    return torch.arange(n, dtype=like.dtype, device=like.device) - (n - 1) / 2


def _between(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``x`` at places in pixels, each (N, H, W), linear between pixels and continued by its edge, with shape (N, C, H, W)."""
    channels, height, width = x.shape[1:]
    top, left = rows.detach().floor(), columns.detach().floor()
    i, j = top.long(), left.long()

    def pixel(i: Tensor, j: Tensor) -> Tensor:
        place = i.clamp(0, height - 1) * width + j.clamp(0, width - 1)
        return (
            x.flatten(2).gather(2, place.flatten(1).unsqueeze(1).expand(-1, channels, -1)).view(-1, channels, *place.shape[1:])
        )

    below, beside = (rows - top).unsqueeze(1), (columns - left).unsqueeze(1)
    upper = torch.lerp(pixel(i, j), pixel(i, j + 1), beside)
    lower = torch.lerp(pixel(i + 1, j), pixel(i + 1, j + 1), beside)
    return torch.lerp(upper, lower, below)


@dataclass(frozen=True)
class Flow(_Ranged):
    r"""Each pixel taken from elsewhere: x at (i + f_1, j + f_2), where the flow f is theta after a Gaussian blur.

    Xiao, Zhu, Li, He, Liu and Song, 2018, "Spatially transformed adversarial examples", https://arxiv.org/abs/1801.02612. The
    paper adds a penalty for rough flows to the loss. Here the blur makes every flow smooth, whatever attack made it; as it
    averages, no pixel comes from farther than the radius, up or down and left or right, and with ``smooth`` at least 0.8 times
    the radius pixels side by side keep their order.

    Arguments:
        radius: The farthest that a pixel may come from, in pixels.
        smooth: The standard deviation of the blur, in pixels.
        low: The least value the data may have.
        high: The greatest.

    Raises:
        UsageError: A radius or a blur that is not positive, or an empty or infinite range.
    """

    radius: float = 1.0
    smooth: float = 2.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        check_positive("flow: radius", self.radius)
        check_positive("flow: smooth", self.smooth)

    @property
    def eps(self) -> float:
        """The radius."""
        return self.radius

    @property
    def ball(self) -> Lp:
        """Theta in [-radius, radius]."""
        return Lp(math.inf, self.radius, -self.radius, self.radius)

    def zero(self, x: Tensor) -> Tensor:
        """Zeros, with shape (N, 2, H, W): down and right."""
        check_images(x)
        return x.new_zeros(len(x), 2, *x.shape[-2:])

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """The images, with shape (N, C, H, W)."""
        height, width = x.shape[-2:]
        f = self._blur(height, x) @ theta @ self._blur(width, x).mT
        index = torch.arange(max(height, width), dtype=x.dtype, device=x.device)
        return _between(x, index[:height].view(-1, 1) + f[:, 0], index[:width] + f[:, 1])

    def _blur(self, n: int, like: Tensor) -> Tensor:
        """The blur on an axis of length n: each row has weights of sum 1, with shape (n, n)."""
        place = _centred(n, like)
        return torch.softmax(-0.5 * ((place.unsqueeze(1) - place) / self.smooth) ** 2, dim=1)


@dataclass(frozen=True)
class Colour(_Few):
    r"""The colours of the whole image, in this order, each by its own entry of theta times its limit.

    On a scale from 0 to 1: v^((1 + gamma)^theta); v + theta * contrast * (v - mean(v)); v + theta * brightness; for colour
    images also v + theta * saturation * (v - luma(v)), and the hue, a turn of v about the axis of greys. What leaves the range
    is clipped. As in Laidlaw and Feizi, 2019, "Functional adversarial attacks", https://arxiv.org/abs/1906.00001, one function
    of colours serves all pixels; here it is given by a few numbers that a person can read.

    Arguments:
        brightness: The greatest value that is added, as a share of the range.
        contrast: The greatest share by which the distance from the image's mean grows or shrinks.
        gamma: The greatest share by which the exponent grows.
        saturation: The greatest share by which the distance from grey grows or shrinks; images of three channels only.
        hue: The greatest turn, in degrees; images of three channels only.
        low: The least value the data may have.
        high: The greatest.

    Raises:
        UsageError: A limit that is negative, or an empty or infinite range.
    """

    brightness: float = 0.2
    contrast: float = 0.3
    gamma: float = 0.3
    saturation: float = 0.3
    hue: float = 20.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        for name in ("brightness", "contrast", "gamma", "saturation", "hue"):
            check_at_least(f"colour: {name}", getattr(self, name), 0)

    def _limits(self, channels: int) -> dict[str, float]:
        limits = {"brightness": self.brightness, "contrast": self.contrast, "gamma": math.log1p(self.gamma)}
        return limits | ({"saturation": self.saturation, "hue": math.radians(self.hue)} if channels == 3 else {})

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """The images, with shape (N, C, H, W)."""
        brightness, contrast, gamma, *colours = (amount.unsqueeze(1) for amount in self._amounts(x, theta))
        v = before = (x - self.low) / self.span
        # A power of 0 is 0, but autograd would have its derivative infinite times 0.
        v = torch.where(v > 0, v.clamp(min=torch.finfo(v.dtype).tiny) ** gamma.exp(), v)
        v = v + contrast * (v - v.mean((1, 2, 3), keepdim=True)) + brightness
        if colours:
            saturation, hue = colours
            luma = (v * v.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
            v = _turned(v + saturation * (v - luma), hue)
        # As a difference, so that zeros change nothing at all.
        return (x + self.span * (v - before)).clamp(self.low, self.high)


def _turned(v: Tensor, angle: Tensor) -> Tensor:
    """Colours (N, 3, H, W) turned about the axis of greys by an angle."""
    grey = v.mean(1, keepdim=True)
    across = (v.roll(1, 1) - v.roll(-1, 1)) / math.sqrt(3)
    # (v - grey) * (cos - 1) rather than grey + (v - grey) * cos: at the angle 0 it is exactly v.
    return v + (v - grey) * (angle.cos() - 1.0) + across * angle.sin()


class _Part(_Ranged):
    """A change of some entries of the input, each by at most eps; theta is what they are changed to."""

    radius: float | None

    @property
    def eps(self) -> float:
        """The radius; the whole range where there is none."""
        return self.span if self.radius is None else self.radius

    @property
    def ball(self) -> Lp:
        """The values that the entries may have."""
        return self._shown()

    def _shown(self) -> Lp:
        return Lp(math.inf, self.eps, self.low, self.high)


@dataclass(frozen=True)
class Sticker(_Part):
    """Pixels inside a rectangle only, any values there unless a radius is given; the rest of the image stays.

    In the manner of Eykholt, Evtimov, Fernandes, Li, Rahmati, Xiao, Prakash, Kohno and Song, 2018, "Robust physical-world
    attacks on deep learning models", https://arxiv.org/abs/1707.08945, but for one image, not for all views of an object.

    Arguments:
        top: Where the rectangle begins, as a share of the height.
        left: Where it begins, as a share of the width.
        height: How high it is, as a share of the height; at least a pixel.
        width: How wide it is, as a share of the width; at least a pixel.
        radius: The most that a value may change; None for any value in the range.
        low: The least value the data may have.
        high: The greatest.

    Raises:
        UsageError: The rectangle is not inside the image, the radius is not positive, or the range is empty or infinite.
    """

    top: float
    left: float
    height: float
    width: float
    radius: float | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        check_positive("sticker: radius", self.radius)
        for begin, size in (("top", "height"), ("left", "width")):
            at, length = getattr(self, begin), getattr(self, size)
            if not (0 <= at < 1 and 0 < length <= 1 - at + 1e-9):
                where = f"sticker: {begin} is {at} and {size} is {length}"
                raise UsageError(f"{where}; they are shares of the image's side, and their sum is at most 1")

    def _window(self, x: Tensor) -> tuple[slice, slice]:
        """The rows and the columns of the rectangle."""
        return _pixels(self.top, self.height, x.shape[-2]), _pixels(self.left, self.width, x.shape[-1])

    def zero(self, x: Tensor) -> Tensor:
        """The pixels that are there, with the height and the width of the rectangle."""
        check_images(x)
        return x[:, :, *self._window(x)].clone()

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """The images with theta in the rectangle, with shape (N, C, H, W)."""
        z = x.clone()
        z[:, :, *self._window(x)] = theta
        return z


def _pixels(begin: float, length: float, n: int) -> slice:
    """From a share to another of n pixels, at least one."""
    first = min(round(begin * n), n - 1)
    return slice(first, max(first + 1, round((begin + length) * n)))


@dataclass(frozen=True, eq=False, repr=False)
class Masked(_Part):
    """The entries inside a mask only, by at most a radius; inputs need not be images.

    Arguments:
        mask: Which entries may change: bool, with the shape of an input, or of its last axes (H, W).
        radius: The most that a value may change; None for any value in the range.
        low: The least value the data may have.
        high: The greatest.

    Raises:
        UsageError: The mask is not bool or all False, the radius is not positive, or the range is empty or infinite.
    """

    mask: Tensor
    radius: float | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        check_positive("masked: radius", self.radius)
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool or not bool(self.mask.any()):
            raise UsageError("the mask should be a tensor of type bool in which at least one entry is True")

    def zero(self, x: Tensor) -> Tensor:
        """The entries that are there, (N, K), or (N, C, K) where the mask is for the last axes of images, and so on."""
        n = self.mask.ndim
        if not 0 < n < x.ndim or x.shape[-n:] != self.mask.shape:
            raise UsageError(
                f"the mask has shape {tuple(self.mask.shape)}; the last axes of the inputs have {tuple(x.shape[1:])}"
            )
        return x[..., self.mask.to(x.device)]

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """The inputs with theta inside the mask, with the shape of x."""
        z = x.clone()
        z[..., self.mask.to(x.device)] = theta
        return z

    def __repr__(self) -> str:
        """The mask by the first digits of its SHA-256, so that two masks are not taken for one."""
        shape = tuple(self.mask.shape)
        digest = hashlib.sha256(f"{shape}".encode() + self.mask.cpu().numpy().tobytes()).hexdigest()[:12]
        about = f"mask={digest}, {int(self.mask.sum())} of {self.mask.numel()} entries"
        return f"Masked({about}, radius={self.radius}, low={self.low}, high={self.high})"
