r"""What a sound hides: the global masking threshold of ISO 11172-3, psychoacoustic model 1, as attacks on speech use it.

Symbols: x is a waveform (N, T) in [-1, 1], delta what is added; F frames of 2048 samples, 512 apart, and B = 1025 bins; the
power spectral density p(k), of which the greatest of a sound is set to 96 dB; z(k) the Bark scale; theta the threshold, on the
scale of p, not in decibels.

Qin, Carlini, Goodfellow, Cottrell and Raffel, 2019, "Imperceptible, robust, and targeted adversarial examples for automatic
speech recognition", https://arxiv.org/abs/1903.10346. As there, every local maximum of p is taken for a tone (tones mask less
than noise, so that less is allowed). Below 1 Bark, where hearing is worse and worse, the threshold in quiet is that of 1 Bark.
The ends of a sound are continued with zeros, so that every sample is in four frames; there are none after its last sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.errors import UsageError
from advkit.sound.threats import check_sounds, lengths

WINDOW, HOP = 2048, 512
"""The length of a frame, and from one to the next, in samples."""
FULL = 96.0
"""The level of the loudest bin of a sound, in dB."""
APART = 0.5
"""Of maskers closer than this, in Bark, only the strongest counts."""
RATES = 8_000, 48_000
"""The least and the greatest rate, in samples a second, for which the threshold stands."""


@dataclass(frozen=True, eq=False)
class Threshold:
    """The masking threshold of a batch of sounds.

    Attributes:
        theta: The threshold, with shape (N, F, B), linear; at 1 is 0 dB.
        psd_max: The greatest power spectral density of each sound before it was set to 96 dB, with shape (N,).
        frames: How many frames begin before a sound's trailing zeros, with shape (N,); the others do not count.
    """

    theta: Tensor
    psd_max: Tensor
    frames: Tensor

    @property
    def counted(self) -> Tensor:
        """Which frames count, with shape (N, F, 1)."""
        k = torch.arange(self.theta.shape[1], device=self.theta.device)
        return (k < self.frames.unsqueeze(1)).unsqueeze(2)


def spectrum(x: Tensor) -> Tensor:
    """The short-time Fourier transform, with shape (N, F, B), complex; every sample is in four frames."""
    whole = -(-x.shape[1] // HOP) * HOP
    padded = F.pad(x, (WINDOW - HOP, WINDOW - HOP + whole - x.shape[1]))
    return torch.fft.rfft(padded.unfold(1, WINDOW, HOP) * _hann().to(x))


def sound(z: Tensor, samples: int) -> Tensor:
    """The sound whose frames are closest to these (Griffin and Lim, 1984), (N, samples); it inverts :func:`spectrum`."""
    # The squares of four Hann windows, a quarter apart, add up to 3 / 2.
    frames = torch.fft.irfft(z, WINDOW) * (_hann().to(z.real) / 1.5)
    whole = (z.shape[1] - 1) * HOP + WINDOW
    x = F.fold(frames.mT, (1, whole), (1, WINDOW), stride=(1, HOP)).flatten(1)
    return x[:, WINDOW - HOP : WINDOW - HOP + samples]


def _power(z: Tensor) -> Tensor:
    """The power spectral density of frames (N, F, B), corrected for the window."""
    return 8 / 3 * (z.real**2 + z.imag**2) / WINDOW**2


def amplitude(threshold: Threshold) -> Tensor:
    """The greatest size of :func:`spectrum` that is under the threshold, with shape (N, F, B)."""
    return (threshold.theta * threshold.psd_max.view(-1, 1, 1) * (3 / 8 * WINDOW**2 / 10 ** (FULL / 10))).sqrt()


def psd(delta: Tensor, threshold: Threshold) -> Tensor:
    """The power spectral density of what is added, on the scale of the threshold, with shape (N, F, B); differentiable."""
    return _power(spectrum(delta)) * (10 ** (FULL / 10) / threshold.psd_max).view(-1, 1, 1)


def excess(delta: Tensor, threshold: Threshold) -> Tensor:
    """The mean of max(p - theta, 0) over frames and bins, with shape (N,): Qin's loss, 0 where nothing is heard."""
    over = (psd(delta, threshold) - threshold.theta).clamp(min=0) * threshold.counted
    return over.sum((1, 2)) / (threshold.frames * over.shape[2])


def above(delta: Tensor, threshold: Threshold) -> Tensor:
    """The share of bins in which what is added is louder than the threshold, with shape (N,)."""
    over = (psd(delta, threshold) > threshold.theta) & threshold.counted
    return over.sum((1, 2)) / (threshold.frames * over.shape[2])


def share_above(x_adv: Tensor, x: Tensor, rate: int) -> Tensor:
    """The share of bins in which x_adv - x is louder than what x hides, with shape (N,).

    Raises:
        UsageError: As in :func:`threshold`.
    """
    return above(x_adv - x, threshold(x, rate))


def bark(f: Tensor) -> Tensor:
    """The critical band of a frequency in Hz, in Bark (Zwicker and Terhardt, 1980)."""
    return 13 * torch.atan(0.00076 * f) + 3.5 * torch.atan((f / 7500) ** 2)


def quiet(f: Tensor) -> Tensor:
    """The threshold in quiet at frequencies greater than 0 Hz, in dB (Terhardt, 1979), less the 12 dB of ISO 11172-3."""
    k = f / 1000
    return 3.64 * k**-0.8 - 6.5 * torch.exp(-0.6 * (k - 3.3) ** 2) + 0.001 * k**4 - 12


def threshold(x: Tensor, rate: int) -> Threshold:
    """The masking threshold of sounds (N, T).

    Raises:
        UsageError: The rate is not from 8 to 48 kHz, these are no waveforms, or one is digital silence.
    """
    if not RATES[0] <= rate <= RATES[1]:
        raise UsageError(f"the rate is {rate}; the masking threshold stands from {RATES[0]} to {RATES[1]} samples a second")
    check_sounds(x)
    # In float64, where the silent bins next to loud ones are not lost; the greatest of each row is 96 dB.
    p = _power(spectrum(x.double()))
    psd_max = p.amax((1, 2))
    level = FULL + 10 * (p / psd_max.view(-1, 1, 1)).clamp(min=1e-30).log10()
    theta = torch.stack([_masked(row, rate) for row in level])
    frames = -(-(lengths(x) + WINDOW - HOP) // HOP)
    return Threshold(theta.to(x.dtype), psd_max.to(x.dtype), frames)


@lru_cache(maxsize=8)
def _hann() -> Tensor:
    return torch.hann_window(WINDOW, dtype=torch.float64)


@lru_cache(maxsize=8)
def _scale(rate: int) -> tuple[Tensor, Tensor]:
    """Each bin's place in Bark, and its threshold in quiet in dB; both (B,), float64."""
    f = torch.arange(WINDOW // 2 + 1, dtype=torch.float64) * rate / WINDOW
    z = bark(f)
    return z, quiet(torch.where(z > 1, f, f[z > 1][0]))


def _masked(level: Tensor, rate: int) -> Tensor:
    """The threshold for one sound's levels in dB, (F, B): in quiet, and what each masker adds to it."""
    z, alone = (part.to(level.device) for part in _scale(rate))
    strength = _maskers(level, z, alone)
    most = int((strength > -math.inf).sum(1).max())
    theta = (10 ** (alone / 10)).expand_as(level).clone()
    # The maskers of each frame one after the other: all at once would not fit the memory.
    for P, k in zip(*(part.mT.unsqueeze(2) for part in strength.topk(most, dim=1)), strict=True):
        theta += 10 ** (_spread(P, z[k], z) / 10)
    return theta


def _maskers(level: Tensor, z: Tensor, alone: Tensor) -> Tensor:
    """The strength in dB of the maskers of each frame, at their bins, -inf elsewhere; (F, B).

    A masker is a local maximum with its two neighbours, louder than the threshold in quiet; of those closer than half a Bark,
    the strongest.
    """
    peak = F.pad((level[:, 1:-1] > level[:, :-2]) & (level[:, 1:-1] > level[:, 2:]), (1, 1))
    power = F.pad((10 ** (level / 10)).unfold(1, 3, 1).sum(2), (1, 1), value=1.0)
    strength = torch.where(peak, 10 * power.log10(), -math.inf)
    strength = torch.where(strength > alone, strength, -math.inf)
    first, last = torch.searchsorted(z, z - APART, right=True), torch.searchsorted(z, z + APART) - 1
    return torch.where(strength >= _greatest(strength, first, last), strength, -math.inf)


def _greatest(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The greatest of values (F, B) from bin first[k] to last[k], for each k: of two stretches that overlap."""
    powers, stretches = (last - first + 1).log2().floor().long(), [values]
    for i in range(int(powers.max())):
        stretches.append(torch.maximum(stretches[-1], F.pad(stretches[-1][:, 1 << i :], (0, 1 << i), value=-math.inf)))
    table = torch.stack(stretches)
    return torch.maximum(*(table[powers, :, begin].mT for begin in (first, last + 1 - (1 << powers))))


def _spread(P: Tensor, z_m: Tensor, z: Tensor) -> Tensor:
    """How loud something at z may be beside a tone of P dB at z_m, in dB: 27 dB less a Bark below it, and above it up to 27."""
    dz = z - z_m
    slope = torch.where(dz > 0, 0.37 * (P - 40).clamp(min=0) - 27, 27.0)
    return P - 6.025 - 0.275 * z_m + slope * dz
