r"""PocketSphinx's acoustic model in torch: from a waveform to the scores of its senones, with gradients.

Symbols: a waveform (N, T) in [-1, 1] has F frames of 25.6 ms, 10 ms apart. Each becomes 13 mel-frequency cepstral
coefficients (MFCC); with their first and second differences these are three streams. A senone s of phone b scores
\sum_{stream} log \sum_k w_{s,k} N(stream; mu_{b,k}, sigma^2_{b,k}), and the recogniser keeps the four largest Gaussians of
each phone's 128 and no Gaussian further than 9.8 nats below the best of all phones.

The front end's noise removal multiplies each band by a gain that follows the sound's past; gradients take it as given.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from advkit.audio.sphinx_files import (
    Array,
    Definition,
    read_definition,
    read_dictionary,
    read_gaussians,
    read_settings,
    read_weights,
)
from advkit.errors import UsageError

RATE, WINDOW, SHIFT, FFT = 16_000, 410, 160, 512
STEP = math.log(1.0001)
"""The resolution of the recogniser's logarithms in nats."""
UNIT = 1024 * STEP
"""What one unit of the recogniser's scores is in nats."""
DEEPEST = 96 * UNIT
"""How far below the best Gaussian of a frame another may be."""
TOP = 4
"""How many Gaussians of a phone count."""
COLD = (40.0, 3.0, -1.0)
"""The first coefficients of the mean that a fresh streaming decoder assumes; the others are 0."""


@dataclass(frozen=True)
class Bands:
    """The settings of a model's front end that differ from model to model.

    Arguments:
        low: The lower edge of the lowest mel band, in Hz.
        high: The upper edge of the highest.
        count: How many bands there are.
        lifter: The length of the liftering.
    """

    low: float
    high: float
    count: int
    lifter: int


def mel_filters(bands: Bands) -> Array:
    """Triangles of unit area whose corners are frequencies of the transform, (count, FFT / 2 + 1)."""
    low, high = (2595 * math.log10(1 + edge / 700) for edge in (bands.low, bands.high))
    corners = 700 * (10 ** (np.linspace(low, high, bands.count + 2) / 2595) - 1)
    bins = np.floor(corners * FFT / RATE + 0.5)
    k = np.arange(FFT // 2 + 1)
    left, centre, right = (bins[i : i + bands.count, None] for i in range(3))
    slopes = np.minimum((k - left) / (centre - left), (right - k) / (right - centre))
    return np.asarray(slopes.clip(0) * 2 / ((right - left) * RATE / FFT))


def noise_gains(power: Array) -> Array:
    """What noise removal multiplies mel bands by, before smoothing over bands; both (N, F, bands), float64.

    A lower envelope follows the smoothed power and is taken from it; what remains is masked by its own recent peak and held
    above its own lower envelope. After C. Kim and R. Stern, 2016, "Power-normalized cepstral coefficients (PNCC) for robust
    speech recognition", https://research.google.com/pubs/pub45964.html.
    """
    smooth, noise, floor = power[:, 0], power[:, 0] / 20, power[:, 0] / 20
    peak, gains = np.zeros_like(smooth), np.empty_like(power)
    for t in range(power.shape[1]):
        smooth = 0.7 * smooth + 0.3 * power[:, t]
        noise = _envelope(smooth, noise)
        signal = np.maximum(smooth - noise, 1.0)
        floor = _envelope(signal, floor)
        peak = 0.85 * peak
        masked = np.where(signal < 0.85 * peak, 0.2 * peak, signal)
        peak = np.maximum(peak, signal)
        gains[:, t] = np.maximum(masked, floor) / np.maximum(smooth, 1e-30)
    return gains.clip(1 / 20, 20)


def _envelope(value: Array, low: Array) -> Array:
    slow = np.where(value >= low, 0.995, 0.5)
    return np.asarray(slow * low + (1 - slow) * value)


class FrontEnd(nn.Module):
    """Waveforms to MFCC as PocketSphinx computes them, noise removal included.

    Arguments:
        bands: The model's settings.
    """

    window: Tensor
    filters: Tensor
    smoothing: Tensor
    transform: Tensor

    def __init__(self, bands: Bands) -> None:
        super().__init__()
        n, k = bands.count, np.arange(13)
        near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 4
        cosines = np.cos(np.pi / n * np.outer(k, np.arange(n) + 0.5)) * np.sqrt(np.where(k, 2, 1) / n)[:, None]
        lifter = 1 + bands.lifter // 2 * np.sin(k * np.pi / bands.lifter)
        constants = {
            "window": np.hamming(WINDOW),
            "filters": mel_filters(bands).T,
            "smoothing": near / near.sum(0),
            "transform": (cosines * lifter[:, None]).T,
        }
        for name, value in constants.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)).float())

    def forward(self, x: Tensor) -> Tensor:
        """MFCC of waveforms (N, T) in [-1, 1], (N, F, 13), F = max(0, 1 + (T - 410) // 160) + 1."""
        samples = x * 32768
        emphasised = samples - 0.97 * functional.pad(samples, (1, 0))[:, :-1]
        whole = max(0, 1 + (x.shape[1] - WINDOW) // SHIFT)
        frames = functional.pad(emphasised, (0, whole * SHIFT + WINDOW - x.shape[1])).unfold(1, WINDOW, SHIFT)
        mel = torch.fft.rfft(frames * self.window.to(x), FFT).abs().square() @ self.filters.to(x)
        gains = noise_gains(mel.detach().double().cpu().numpy())
        kept = mel * (torch.from_numpy(gains).to(x) @ self.smoothing.to(x))
        return (kept + 1e-4).log() @ self.transform.to(x)


def batch_normalised(c: Tensor) -> Tensor:
    """MFCC (N, F, 13) less their mean over the frames that sound, as whole utterances are decoded."""
    sounding = (c[..., :1] >= 0).to(c)
    return c - (c * sounding).sum(1, keepdim=True) / sounding.sum(1, keepdim=True).clamp(min=1)


def cold_normalised(c: Tensor) -> Tensor:
    """MFCC (N, F, 13) less the mean that a fresh streaming decoder assumes: that of its first three seconds."""
    mean = functional.pad(c.new_tensor(COLD), (0, c.shape[2] - len(COLD)))
    return torch.where(c[..., :1] >= 0, c - mean, c)


def streams(c: Tensor) -> Tensor:
    """MFCC (N, F, 13) with first and second differences, (N, F, 3, 13); the ends repeat."""
    count = c.shape[1]
    wide = torch.cat([c[:, :1].expand(-1, 3, -1), c, c[:, -1:].expand(-1, 3, -1)], 1)
    at = [wide[:, k : k + count] for k in range(7)]
    return torch.stack([c, at[5] - at[1], at[6] - at[2] - at[4] + at[0]], 2)


class AcousticModel(nn.Module):
    """The acoustic model of a folder, for white-box attacks.

    Arguments:
        folder: The folder of the model: ``mdef``, ``means``, ``variances``, ``sendump`` and ``feat.params``.
        dictionary: The file of pronunciations.

    Raises:
        UsageError: A file is missing, or the model is of another kind than this computes.
    """

    quadratic: Tensor
    linear: Tensor
    constant: Tensor
    log_weights: Tensor
    codebooks: Tensor

    def __init__(self, folder: Path, dictionary: Path) -> None:
        super().__init__()
        settings = read_settings(folder / "feat.params")
        _check_kind(settings, folder)
        self.definition: Definition = read_definition(folder / "mdef")
        self.words = read_dictionary(dictionary)
        self.front_end = FrontEnd(
            Bands(float(settings["lowerf"]), float(settings["upperf"]), int(settings["nfilt"]), int(settings["lifter"]))
        )
        mean = read_gaussians(folder / "means").astype(np.float64)
        variance = read_gaussians(folder / "variances").astype(np.float64).clip(1e-4)
        books, count, densities, width = mean.shape
        rows = (count, books * densities, width)
        # The recogniser holds 1 / (2 sigma^2) as a whole number of logarithms to the base 1.0001.
        precision = np.floor(0.5 / variance / STEP) * STEP
        constant = (-0.5 * np.log(2 * np.pi * variance) - mean**2 * precision).sum(-1)
        constants = {
            "quadratic": (-precision).swapaxes(0, 1).reshape(rows).swapaxes(1, 2),
            "linear": (2 * mean * precision).swapaxes(0, 1).reshape(rows).swapaxes(1, 2),
            "constant": constant.swapaxes(0, 1).reshape(count, 1, books * densities),
            "log_weights": -UNIT * read_weights(folder / "sendump", count).astype(np.float32),
        }
        for name, value in constants.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)).float())
        self.register_buffer("codebooks", torch.from_numpy(self.definition.codebooks))

    @property
    def bare(self) -> int:
        """How many senones belong to phones without context; they are the first."""
        return 3 * len(self.definition.phones)

    def gaussians(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The log densities of each phone's largest Gaussians, and their numbers; features are (N, F, 3, 13).

        Returns:
            (N, F, 3, phones, 4) each; densities are relative to the largest of the frame and stream.
        """
        n, frames, count, width = features.shape
        rows = features.permute(2, 0, 1, 3).reshape(count, n * frames, width)
        density = torch.baddbmm(self.constant.to(rows), rows.square(), self.quadratic.to(rows))
        density = torch.baddbmm(density, rows, self.linear.to(rows)).unflatten(2, (len(self.definition.phones), -1))
        best, which = density.topk(TOP, -1)
        best = best - best.detach().amax((2, 3), keepdim=True)
        best, which = (t.unflatten(1, (n, frames)).permute(1, 2, 0, 3, 4) for t in (best, which))
        return best, which

    def scores(self, features: Tensor, senones: Tensor | None = None, clip: bool = True) -> Tensor:
        """Log likelihoods of senones, (N, F, S), in nats, up to a number of the frame's own.

        Arguments:
            features: (N, F, 3, 13), from :func:`streams`.
            senones: The numbers of the senones asked for, (S,); by default, all.
            clip: Whether to ignore, as the recogniser does, how far a poor Gaussian is from the best; that leaves no gradient
                to come back from there.
        """
        wanted = torch.arange(len(self.codebooks)) if senones is None else senones
        density, which = self.gaussians(features)
        if clip:
            density = density.clamp(min=-DEEPEST)
        book = self.codebooks[wanted]
        weights = self.log_weights[:, :, wanted].to(features).flatten()
        stream = torch.arange(which.shape[2]).view(-1, 1, 1) * self.log_weights.shape[1]
        place = (which[:, :, :, book] + stream) * len(wanted) + torch.arange(len(wanted)).view(-1, 1)
        return (density[:, :, :, book] + weights[place]).logsumexp(-1).sum(2)


def _check_kind(settings: dict[str, str], folder: Path) -> None:
    kind = {"feat": "1s_c_d_dd", "transform": "dct", "remove_noise": "yes", "agc": "none", "varnorm": "no", "model": "ptm"}
    for name, value in kind.items():
        if settings.get(name) != value:
            raise UsageError(f"{folder} has {name} {settings.get(name)!r}; this computes models with {name} {value!r}")


@functools.lru_cache(maxsize=1)
def acoustic_model(folder: Path, dictionary: Path) -> AcousticModel:
    """The model of a folder; the last one is kept."""
    return AcousticModel(folder, dictionary).eval()
