"""Changes of a sound that the sound itself hides.

Symbols: x is a waveform (N, T) with F frames of B bins, delta what is added, S(delta) its short-time Fourier transform, A the
greatest size of each bin of it that the masking threshold of x hides, theta what the adversary searches, relative to A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.errors import UsageError
from advkit.norms import lp_norm
from advkit.sound.psychoacoustics import HOP, RATES, WINDOW, amplitude, sound, spectrum, threshold
from advkit.sound.threats import Decibels, check_sounds, sounding

FRAMES, BINS = WINDOW // HOP - 1, 4
"""How far one coefficient is heard: frames that overlap its own, and bins beyond which nothing of a Hann window is left."""


@dataclass(frozen=True)
class Masking(Decibels):
    r"""All x + delta with |S(delta)| <= 10^(db / 20) A in every frame and bin: so many dB above what x hides.

    Theta holds the real and the imaginary parts of frames, (N, 2, F, B), in units of A. Frames overlap and bins leak, so that
    frames of any content are no sound's; delta is the closest sound. For little of it to be louder than A, A is first lowered
    beside what is lower (by half of what leaks, in dB); then frames whose neighbours are still too loud are turned down, and at
    last the whole. So the bound is kept by every theta, delta is proportional to theta, and its norm is the bound: max |theta|.
    It stands before the rounding to 16 bits, which in very quiet places is louder than what can be heard.

    Qin, Carlini, Goodfellow, Cottrell and Raffel, 2019, "Imperceptible, robust, and targeted adversarial examples for automatic
    speech recognition", https://arxiv.org/abs/1903.10346, have the threshold as a penalty; see ``psychoacoustics`` for it.

    Arguments:
        db: How far above the threshold, in decibels; 0 for a change that cannot be heard, inf for the quietest success.
        rate: Samples a second.
        low: The least value the data may have.
        high: The greatest.

    Raises:
        UsageError: The decibels are no number, the rate is not from 8 to 48 kHz, or the range is empty or infinite.
    """

    db: float = math.inf
    rate: int = 16_000
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not RATES[0] <= self.rate <= RATES[1]:
            raise UsageError(f"masking: rate is {self.rate}; it should be from {RATES[0]} to {RATES[1]} samples a second")

    def zero(self, x: Tensor) -> Tensor:
        """Zeros, with shape (N, 2, F, B)."""
        check_sounds(x)
        frames = -(-(x.shape[1] + WINDOW - HOP) // HOP)
        return x.new_zeros(len(x), 2, frames, WINDOW // 2 + 1)

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """The sounds, with shape (N, T)."""
        A, safe = bounds(x, self.rate)
        z = torch.complex(*theta.unbind(1)) * (safe / 2**0.5)
        most = A * lp_norm(theta, math.inf).clamp(min=torch.finfo(theta.dtype).tiny ** 0.5).view(-1, 1, 1)
        loud = self._loudness(x, z, most)
        near = F.max_pool1d(loud, 2 * FRAMES + 1, 1, FRAMES).clamp(min=1)
        z = z / near.unsqueeze(2)
        whole = self._loudness(x, z, most).amax(1).clamp(min=1)
        return self.added(x, self._sound(x, z) / whole.unsqueeze(1))

    def _sound(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.where(sounding(x), sound(z, x.shape[1]), 0.0)

    def _loudness(self, x: Tensor, z: Tensor, most: Tensor) -> Tensor:
        """The greatest ratio of what is added to what may be, in each frame, with shape (N, F)."""
        return (spectrum(self._sound(x, z)).abs() / most).amax(2)


def bounds(x: Tensor, rate: int) -> tuple[Tensor, Tensor]:
    """A, and A lowered beside what is lower, so that little leaks into that; both (N, F, B)."""
    rows = [_known(row.cpu().numpy().tobytes(), str(row.dtype).removeprefix("torch."), rate) for row in x.detach()]
    A, safe = (torch.stack(part).to(x) for part in zip(*rows, strict=True))
    return A, safe


@lru_cache(maxsize=128)
def _known(data: bytes, dtype: str, rate: int) -> tuple[Tensor, Tensor]:
    """The same for one waveform; an attack asks for it at every step."""
    x = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).unsqueeze(0)
    hidden = threshold(x, rate)
    A = amplitude(hidden)[0]
    return A, _lowered(A, torch.where(hidden.counted[0], A, math.inf))


def _lowered(A: Tensor, around: Tensor) -> Tensor:
    """The least of A and of what is around, each divided by the square root of what a coefficient leaves there; (F, B)."""
    leak = _leak()
    near = F.pad(around, (BINS, BINS, FRAMES, FRAMES), value=math.inf)
    frames, bins = A.shape
    safe = A
    for i in range(len(leak)):
        for j in range(leak.shape[1]):
            safe = torch.minimum(safe, near[i : i + frames, j : j + bins] / float(leak[i, j]))
    return safe


@lru_cache(maxsize=1)
def _leak() -> Tensor:
    """The square root of what a coefficient of 1 leaves in the coefficients around it, relative to its own; (7, 9)."""
    middle = WINDOW // 4
    z = torch.zeros(1, 4 * FRAMES + 1, WINDOW // 2 + 1, dtype=torch.complex128)
    z[0, 2 * FRAMES, middle] = 1
    size = spectrum(sound(z, (2 * FRAMES + 1) * HOP))[0].abs()
    near = size[FRAMES : 3 * FRAMES + 1, middle - BINS : middle + BINS + 1]
    return (near / size[2 * FRAMES, middle]).clamp(min=1e-6).sqrt()
