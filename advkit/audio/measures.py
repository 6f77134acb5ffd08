"""How much of a sound an attack changed, and the controls that a result is read beside.

Symbols: x is a waveform (T,) in [-1, 1], x_adv what an attack made of it, delta = x_adv - x.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SHORTEST = 0.4
"""The fewest seconds that PESQ and STOI are taken of: below, they have too few frames."""

WINDOW, HOP = 512, 128
"""Samples of a frame of the phase vocoder, and from one to the next."""


def snr(x: Tensor, x_adv: Tensor) -> float:
    """The signal-to-noise ratio 20 log10(||x||_2 / ||delta||_2) in dB; inf where nothing was changed.

    >>> round(snr(torch.tensor([0.3, 0.4]), torch.tensor([0.35, 0.4])), 4)
    20.0
    """
    return _ratio(float(x.double().norm()), float((x_adv.double() - x.double()).norm()))


def db_x(x: Tensor, x_adv: Tensor) -> float:
    """The loudest sample added against the loudest there is, 20 log10(max |delta| / max |x|) in dB; -inf for no change.

    Carlini and Wagner, 2018, "Audio adversarial examples: targeted attacks on speech-to-text",
    https://arxiv.org/abs/1801.01944.
    """
    return -_ratio(float(x.double().abs().max()), float((x_adv.double() - x.double()).abs().max()))


def _ratio(signal: float, noise: float) -> float:
    return 20 * math.log10(signal / noise) if noise and signal else math.inf if not noise else -math.inf


def share_above(x: Tensor, x_adv: Tensor, rate: int) -> float:
    """The share of bins of time and frequency in which delta is above the masking threshold of x, from 0 to 1."""
    from advkit.sound import psychoacoustics

    return float(psychoacoustics.share_above(x_adv.unsqueeze(0), x.unsqueeze(0), rate)[0])


def pesq(x: Tensor, x_adv: Tensor, rate: int) -> float | None:
    """The perceptual quality of x_adv beside x, from about 1 (bad) to 4.6 (the same), as ITU-T P.862 has it.

    Wide band at 16,000 samples a second, narrow band at 8,000. None where the package ``pesq`` is not installed, at other
    rates, for sounds below 0.4 s, and where it finds no speech.
    """
    if rate not in (8_000, 16_000) or len(x) < SHORTEST * rate:
        return None
    try:
        import pesq as package
    except ImportError:
        return None
    try:
        found = package.pesq(rate, _numpy(x), _numpy(x_adv), "wb" if rate == 16_000 else "nb")
    except (package.PesqError, ValueError):
        return None
    return float(found) if math.isfinite(found) else None


def stoi(x: Tensor, x_adv: Tensor, rate: int) -> float | None:
    """The intelligibility of x_adv beside x, at most 1 (the same).

    Taal, Hendriks, Heusdens and Jensen, 2010, "A short-time objective intelligibility measure for time-frequency weighted noisy
    speech", https://doi.org/10.1109/ICASSP.2010.5495701. None where the package ``pystoi`` is not installed, and for sounds
    with too little speech.
    """
    if len(x) < SHORTEST * rate:
        return None
    try:
        from pystoi import stoi as of
    except ImportError:
        return None
    import warnings

    with warnings.catch_warnings():
        # With too few frames it warns and answers with a number that means nothing.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            found = float(of(_numpy(x), _numpy(x_adv), rate))
        except (RuntimeWarning, ValueError):
            return None
    return found if math.isfinite(found) else None


def sped_up(x: Tensor, length: int) -> Tensor:
    """``x`` said faster, or slower, at its own pitch, so that it has ``length`` samples: a phase vocoder, (length,).

    Flanagan and Golden, 1966, "Phase vocoder", https://doi.org/10.1002/j.1538-7305.1966.tb01706.x. Frames are taken more or
    less often, and in them each frequency's phase goes on as fast as it did.
    """
    window = torch.hann_window(WINDOW)
    frames = torch.stft(x.float(), WINDOW, HOP, window=window, return_complex=True, pad_mode="constant")
    at = torch.arange(0, frames.shape[1], len(x) / length, dtype=torch.float64)
    first, part = at.long(), (at % 1).float()
    frames = torch.nn.functional.pad(frames, (0, 2))
    before, after = frames[:, first], frames[:, first + 1]
    size = (1 - part) * before.abs() + part * after.abs()
    even = (2 * math.pi * HOP / WINDOW * torch.arange(WINDOW // 2 + 1)).unsqueeze(1)
    odd = after.angle() - before.angle() - even
    turned = even + odd - 2 * math.pi * (odd / (2 * math.pi)).round()
    phase = before[:, :1].angle() + torch.cat([torch.zeros_like(even), turned[:, :-1].double().cumsum(1)], 1)
    said = torch.istft(torch.polar(size, phase.float()), WINDOW, HOP, window=window, length=length)
    return said.clamp(-1, 1)


def noise(like: Tensor, rng: torch.Generator) -> Tensor:
    """White noise of the length and the power of ``like``, (T,); samples beyond [-1, 1] are cut."""
    drawn = torch.randn(len(like), generator=rng)
    return (drawn * (like.norm() / drawn.norm())).clamp(-1, 1)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().float().numpy()
