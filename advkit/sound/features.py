"""What recognisers look at: spectra, mel bands and cepstra, with gradients, and the way back from cepstra to a sound.

Symbols: x is a waveform (T,) or a batch (N, T), with F frames, B = n_fft / 2 + 1 bins, M bands and C cepstra. Conventions are
those of librosa (McFee et al., 2015, https://librosa.org). Gradients are finite, also on digital silence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.errors import UsageError
from advkit.spec import check_choice, check_whole

LEAST = 1e-10
"""The least power that a logarithm is taken of: -100 dB."""
PADS = {"constant": "zeros", "reflect": "the sound mirrored"}
"""What a sound is continued with at its ends."""
ROUNDS = 2
"""How often the inversion compares the cepstra of what it made with those wanted."""


def decibels(power: Tensor, top: float | None = None) -> Tensor:
    """10 log10 of a power, at least -100 dB, and with ``top`` at least so much less than each row's greatest; (N, M, F)."""
    db = 10 * power.clamp(min=LEAST).log10()
    return db if top is None else torch.maximum(db, db.amax((-2, -1), keepdim=True) - top)


@dataclass(frozen=True)
class Mel:
    """How a sound is cut into frames, and its spectrum into bands.

    Arguments:
        rate: Samples a second.
        n_fft: The length of the Fourier transform, in samples.
        hop: From one frame to the next, in samples.
        window: The length of the Hann window, in samples, in the middle of n_fft; by default, n_fft.
        bands: M, how many mel bands there are.
        low: Where the first begins, in Hz.
        high: Where the last ends, in Hz; by default, half of the rate.
        htk: Whether mel is 2595 log10(1 + f / 700), rather than Slaney's, linear below 1 kHz.
        norm: ``slaney`` for bands of equal area, None for bands of equal height.
        center: Whether frame k is centred at sample k * hop, rather than begins there.
        pad: What is beyond the ends of a sound whose frames are centred: ``constant`` (zeros) or ``reflect``.

    Raises:
        UsageError: A length that is not positive, a window longer than n_fft, bands that are outside the spectrum.

    >>> Mel(rate=16000, n_fft=400, hop=160, bands=80).log_mel(torch.zeros(2, 1600)).shape
    torch.Size([2, 80, 11])
    """

    rate: int = 16_000
    n_fft: int = 2048
    hop: int = 512
    window: int | None = None
    bands: int = 128
    low: float = 0.0
    high: float | None = None
    htk: bool = False
    norm: str | None = "slaney"
    center: bool = True
    pad: str = "constant"

    def __post_init__(self) -> None:
        for name, least in (("rate", 1), ("n_fft", 2), ("hop", 1), ("bands", 1)):
            check_whole(f"mel: {name}", getattr(self, name), least)
        if self.window is not None and not 1 <= self.window <= self.n_fft:
            raise UsageError(f"mel: window is {self.window}; it should be from 1 to n_fft, {self.n_fft}")
        if not 0 <= self.low < self.top <= self.rate / 2:
            allowed = f"0 <= low < high <= {self.rate / 2:g}, half of the rate"
            raise UsageError(f"mel: low is {self.low} and high is {self.top}; it should be {allowed}")
        check_choice("mel: pad", self.pad, PADS)
        if self.norm not in ("slaney", None):
            raise UsageError(f"mel: norm is {self.norm!r}; it should be 'slaney' or None")

    @property
    def top(self) -> float:
        """Where the last band ends, in Hz."""
        return self.rate / 2 if self.high is None else self.high

    def stft(self, x: Tensor) -> Tensor:
        """The short-time Fourier transform, with shape (N, B, F), complex.

        Raises:
            UsageError: The sound is shorter than a frame.
        """
        least = (self.n_fft // 2 + 1 if self.pad == "reflect" else 1) if self.center else self.n_fft
        if x.shape[-1] < least:
            raise UsageError(f"the sound has {x.shape[-1]} samples; frames of {self.n_fft} need at least {least}")
        return torch.stft(
            x,
            self.n_fft,
            self.hop,
            window=_hann(self.window or self.n_fft).to(x),
            win_length=self.window or self.n_fft,
            center=self.center,
            pad_mode=self.pad,
            return_complex=True,
        )

    def power(self, x: Tensor) -> Tensor:
        """The power spectrum, with shape (N, B, F)."""
        z = self.stft(x)
        return z.real**2 + z.imag**2

    def mel(self, x: Tensor) -> Tensor:
        """The power in each band, with shape (N, M, F)."""
        return filters(self).to(x) @ self.power(x)

    def log_mel(self, x: Tensor, top: float | None = 80.0) -> Tensor:
        """The same in decibels, at most ``top`` less than a row's greatest, with shape (N, M, F)."""
        return decibels(self.mel(x), top)

    def mfcc(self, x: Tensor, cepstra: int = 20, lifter: float = 0.0) -> Tensor:
        """The first cepstra of log_mel, with shape (N, C, F); cepstrum n is multiplied by 1 + lifter/2 sin(pi (n+1) / lifter).

        Raises:
            UsageError: There are more cepstra than bands, or less than one; or the lifter is negative.
        """
        basis = self._dct(cepstra, lifter)
        return basis.to(x) @ self.log_mel(x)

    def _dct(self, cepstra: int, lifter: float) -> Tensor:
        if not 1 <= cepstra <= self.bands or not lifter >= 0:
            allowed = f"cepstra are from 1 to the number of bands, {self.bands}, and a lifter is at least 0"
            raise UsageError(f"there are {cepstra} cepstra and the lifter is {lifter}; {allowed}")
        return _lifted(cepstra, lifter).unsqueeze(1) * _dct(cepstra, self.bands)

    def invert(self, mfcc: Tensor, samples: int, *, rng: torch.Generator, lifter: float = 0.0) -> Tensor:
        """Noise with the cepstra wanted, as near as two more rounds bring it, with shape (N, samples).

        White noise passes through filters that follow the smooth spectrum of the cepstra, faded from one frame to the next;
        what the result's own cepstra lack is added to those wanted, and the same noise is filtered again. No phase and no
        pitch is searched for: a call takes milliseconds.

        Arguments:
            mfcc: What :meth:`mfcc` gives, with shape (N, C, F).
            samples: The length of the sound.
            rng: Where the noise comes from.
            lifter: The lifter of ``mfcc``.
        """
        basis = self._dct(mfcc.shape[-2], lifter).to(mfcc)
        back = (basis / _lifted(mfcc.shape[-2], lifter).to(mfcc).unsqueeze(1) ** 2).mT
        noise = _Noise(self, mfcc, samples, rng)
        log_mel = back @ mfcc
        x = noise.shaped(log_mel)
        for _ in range(ROUNDS):
            log_mel = log_mel + back @ (mfcc - basis @ self.log_mel(x))
            x = noise.shaped(log_mel)
        return x


class _Noise:
    """White noise in frames that fade into each other, to be filtered again and again."""

    def __init__(self, mel: Mel, like: Tensor, samples: int, rng: torch.Generator) -> None:
        self.samples, self.hop, frames = samples, mel.hop, like.shape[-1]
        # Room for the window, two hops long, and for what a filter spreads.
        self.n = 2 ** math.ceil(math.log2(max(3 * mel.hop, mel.n_fft)))
        self.skip = self.n // 2 - (0 if mel.center else mel.n_fft // 2)
        white = torch.randn(*like.shape[:-2], (frames - 1) * mel.hop + self.n, generator=rng, device=rng.device).to(like)
        fade = F.pad(_hann(2 * mel.hop), ((self.n - 2 * mel.hop) // 2, (self.n - 2 * mel.hop + 1) // 2)).to(like)
        self.spectrum = torch.fft.rfft(white.unfold(-1, self.n, mel.hop) * fade)
        between, flat = _between(mel, self.n)
        self.between, self.flat = between.to(like), (10 * flat.log10()).to(like).unsqueeze(1)
        self.inside = (self.between != 0).any(1).to(like)

    def shaped(self, log_mel: Tensor) -> Tensor:
        """The noise with these powers in the bands, in decibels (N, M, F), with shape (N, samples)."""
        gain = 10 ** ((self.between @ (log_mel - self.flat)).mT / 20) * self.inside
        frames = torch.fft.irfft(self.spectrum * gain, self.n)
        flat = frames.reshape(-1, *frames.shape[-2:]).mT
        whole = (frames.shape[-2] - 1) * self.hop + self.n
        x = F.fold(flat, (1, whole), (1, self.n), stride=(1, self.hop)).view(*frames.shape[:-2], whole)[..., self.skip :]
        return F.pad(x, (0, max(0, self.samples - x.shape[-1])))[..., : self.samples]


def mangled(
    x: Tensor, rate: int, *, window: float = 0.025, hop: float = 0.020, cepstra: int = 13, bands: int = 40, rng: torch.Generator
) -> Tensor:
    """What is left of a sound when only its cepstra are kept: they are taken, and noise is given the same, with shape (T,).

    Carlini, Mishra, Vaidya, Zhang, Sherr, Shields, Wagner and Zhou, 2016, "Hidden voice commands",
    https://www.usenix.org/conference/usenixsecurity16/technical-sessions/presentation/carlini: a recogniser that looks at
    cepstra may still understand it, a person may not. The result is as long and as loud (root mean square) as x.

    Arguments:
        x: The waveform, (T,) in [-1, 1].
        rate: Samples a second.
        window: The length of a frame, in seconds.
        hop: From one frame to the next, in seconds.
        cepstra: How many are kept.
        bands: How many bands they are made of.
        rng: Where the noise comes from.

    Raises:
        UsageError: A length that is not positive, or more cepstra than bands.
    """
    if not window > 0 or not hop > 0:
        raise UsageError(f"window is {window} and hop is {hop}; both are seconds, greater than 0")
    size = max(2, round(window * rate))
    mel = Mel(rate, max(512, 2 ** math.ceil(math.log2(size))), max(1, round(hop * rate)), size, bands)
    y = mel.invert(mel.mfcc(x, cepstra), len(x), rng=rng)
    loud = torch.linalg.vector_norm(x) / torch.linalg.vector_norm(y).clamp(min=LEAST)
    return (y * loud).clamp(-1, 1)


@lru_cache(maxsize=32)
def _hann(n: int) -> Tensor:
    """The Hann window of which the next sample would be the first again, with shape (n,), float64."""
    return torch.hann_window(n, dtype=torch.float64)


@lru_cache(maxsize=32)
def _dct(cepstra: int, bands: int) -> Tensor:
    """The first rows of the orthonormal discrete cosine transform, with shape (C, M), float64."""
    n, m = torch.arange(cepstra, dtype=torch.float64).unsqueeze(1), torch.arange(bands, dtype=torch.float64) + 0.5
    basis = (2 / bands) ** 0.5 * torch.cos(math.pi * n * m / bands)
    basis[0] /= 2**0.5
    return basis


def _lifted(cepstra: int, lifter: float) -> Tensor:
    """What each cepstrum is multiplied by, with shape (C,), float64."""
    n = torch.arange(1, cepstra + 1, dtype=torch.float64)
    return 1 + lifter / 2 * torch.sin(math.pi * n / lifter) if lifter else torch.ones_like(n)


def _edges(mel: Mel) -> np.ndarray[Any, Any]:
    """The frequencies, in Hz, at which bands begin, are highest and end, with shape (M + 2,)."""
    if mel.htk:
        low, high = (2595 * math.log10(1 + f / 700) for f in (mel.low, mel.top))
        return 700 * (10 ** (np.linspace(low, high, mel.bands + 2) / 2595) - 1)
    # Slaney's: 15 a kHz up to 1 kHz, then 27 for a factor of 6.4.
    step = math.log(6.4) / 27
    low, high = (3 * f / 200 if f < 1000 else 15 + math.log(f / 1000) / step for f in (mel.low, mel.top))
    at = np.linspace(low, high, mel.bands + 2)
    return np.where(at < 15, 200 * at / 3, 1000 * np.exp(step * (at - 15)))


@lru_cache(maxsize=32)
def filters(mel: Mel) -> Tensor:
    """The weights of the bands, triangles over the bins, with shape (M, B), float64."""
    edges, f = _edges(mel), np.fft.rfftfreq(mel.n_fft, 1 / mel.rate)
    begin, peak, end = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    weights = np.minimum((f - begin) / (peak - begin), (end - f) / (end - peak)).clip(0)
    return torch.from_numpy(weights * 2 / (end - begin) if mel.norm else weights)


@lru_cache(maxsize=32)
def _between(mel: Mel, n: int) -> tuple[Tensor, Tensor]:
    """From bands to the bins of a transform of length n: straight lines between the bands' peaks, (n / 2 + 1, M), float64.

    And the power that white noise of variance 1 has in each band, (M,). Bands without a bin are passed over.
    """
    area = filters(mel).sum(1)
    full = (area > 0).numpy()
    f, peaks = np.fft.rfftfreq(n, 1 / mel.rate), _edges(mel)[1:-1]
    weights = np.zeros((len(f), mel.bands))
    weights[:, full] = np.stack([np.interp(f, peaks[full], row) for row in np.eye(int(full.sum()))], 1)
    weights[(f < mel.low) | (f > mel.top)] = 0
    energy = _hann(mel.window or mel.n_fft).square().sum()
    return torch.from_numpy(weights), torch.where(area > 0, area * energy, 1.0)
