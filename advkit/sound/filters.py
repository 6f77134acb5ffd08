"""What a recogniser may do to a sound before it listens: fewer levels, a smoother curve, less of what is quiet.

Transforms as in :mod:`advkit.sound.air`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit import spec
from advkit.errors import UsageError
from advkit.sound.air import RATE, check_rate, check_waves, heard, there_and_back
from advkit.streams import Streams


@dataclass(frozen=True)
class Quantise:
    """Each sample at the nearest of a few values between plus and minus the loudest, of which 0 is one.

    The gradient is that of the identity.

    Arguments:
        levels: How many values, odd, at least 3.
    """

    levels: int = 255
    random = False
    straight = True

    def __post_init__(self) -> None:
        spec.check_whole("quantise: levels", self.levels, 3)
        if self.levels % 2 == 0:
            raise UsageError(f"quantise: levels is {self.levels}; it should be odd, so that silence stays silent")

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The rounded sounds."""
        check_waves("quantise", x)
        step = x.detach().abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / (self.levels // 2)
        return heard("quantise", x, x + ((x / step).round() * step - x).detach())


@dataclass(frozen=True)
class Median:
    """Each sample is the median of those around it; beyond an end there are zeros.

    Arguments:
        size: How many samples, odd, at least 3.
    """

    size: int = 3
    random = False
    straight = False

    def __post_init__(self) -> None:
        _check_window("median", self.size)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The filtered sounds."""
        return heard("median", x, _windows("median", x, self.size).median(2).values)


@dataclass(frozen=True)
class Average:
    """Each sample is the mean of those around it; beyond an end there are zeros.

    Arguments:
        size: How many samples, odd, at least 3.
    """

    size: int = 3
    random = False
    straight = False

    def __post_init__(self) -> None:
        _check_window("average", self.size)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The smoothed sounds."""
        return heard("average", x, _windows("average", x, self.size).mean(2))


def _check_window(name: str, size: int) -> None:
    spec.check_whole(f"{name}: size", size, 3)
    if size % 2 == 0:
        raise UsageError(f"{name}: size is {size}; it should be odd, so that nothing is delayed")


def _windows(name: str, x: Tensor, size: int) -> Tensor:
    """The samples around each, with shape (M, T, size)."""
    check_waves(name, x)
    return F.pad(x, (size // 2, size // 2)).unfold(1, size, 1)


WINDOW = 0.032
"""The length of a frame of the spectrum, in seconds."""


@dataclass(frozen=True)
class Squeeze:
    """The parts of a spectrum that are quiet are left out: those far below the loudest of their frame.

    Frames of 32 ms under the root of a Hann window, half of each shared with the next. What is kept is kept as it is, so the
    gradient passes through it; which parts are kept has none.

    Arguments:
        db: How far below the loudest a part may be and stay, in decibels.
        rate: Samples a second.
    """

    db: float = 30.0
    rate: int = RATE
    random = False
    straight = False

    def __post_init__(self) -> None:
        spec.check_positive("squeeze: db", self.db)
        check_rate("squeeze", self.rate)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds of what is left."""
        check_waves("squeeze", x)
        hop = round(WINDOW * self.rate / 2)
        n, padded = 2 * hop, F.pad(x, (2 * hop, 3 * hop))
        window = _root_hann(n).to(x)
        parts = torch.stft(padded, n, hop, window=window, center=False, return_complex=True)
        level = parts.detach().abs()
        left = torch.where(level >= level.amax(1, keepdim=True) * 10 ** (-self.db / 20), parts, 0.0)
        frames = torch.fft.irfft(left, n, dim=1) * window.unsqueeze(1)
        length = n + hop * (frames.shape[2] - 1)
        whole = F.fold(frames, (1, length), (1, n), stride=(1, hop)).flatten(1)
        return heard("squeeze", x, whole[:, 2 * hop : 2 * hop + x.shape[1]])


@functools.lru_cache(maxsize=8)
def _root_hann(n: int) -> Tensor:
    return torch.hann_window(n, dtype=torch.float64).sqrt()


@dataclass(frozen=True)
class Reclock:
    """At a random lower rate and back.

    Arguments:
        least: The lowest share of the rate, greater than 0.
        most: The highest, at most 1.
        rate: Samples a second of the sounds.
    """

    least: float = 0.4
    most: float = 0.8
    rate: int = RATE
    random = True
    straight = False

    def __post_init__(self) -> None:
        check_rate("reclock", self.rate)
        spec.check_at_least("reclock: most", self.most, self.least)
        spec.check_between("reclock: most", self.most)
        if self.least * self.rate < 1000:
            raise UsageError(f"reclock: least is {self.least}; it should leave at least 1000 of {self.rate} samples a second")

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds as they come back."""
        check_waves("reclock", x)
        u = rng.uniform(1, rows=rows, dtype=torch.float64)[:, 0]
        # In steps of a hundredth, so that a filter has few phases.
        step = max(1, self.rate // 100)
        rates = (self.rate * (self.least + (self.most - self.least) * u) / step).round().long() * step
        z = torch.cat([there_and_back(one, self.rate, int(to)) for one, to in zip(x.split(1), rates, strict=True)])
        return heard("reclock", x, z)


FILTERS: spec.Table = {"quantise": Quantise, "median": Median, "average": Average, "squeeze": Squeeze, "reclock": Reclock}
"""What a recogniser may do to a sound before it listens."""
