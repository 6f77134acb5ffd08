"""Sound in files: read as mono at one rate, written as 16-bit WAV.

A success is what a file holds: waveforms are decided on after :func:`quantised`, which is what writing and reading does.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor

from advkit.errors import UsageError, first_line

LONGEST = 120.0
"""The most seconds that a sound may last: a recogniser takes a sentence, not a recording of an hour."""

STEPS = 32768
"""The steps of 16 bits on each side of zero."""


def quantised(x: Tensor) -> Tensor:
    """``x`` as a 16-bit file holds it: multiples of 1/32768 from -1 to 1 - 1/32768, with the shape and dtype of x."""
    return (x * STEPS).round().clamp(-STEPS, STEPS - 1) / STEPS


def write(path: str | Path, x: Tensor, rate: int) -> None:
    """Write a waveform (T,) in [-1, 1] as a mono WAV file of 16 bits."""
    whole = (quantised(x.detach().cpu().double()) * STEPS).to(torch.int16)
    wavfile.write(path, rate, whole.numpy())


def read(path: str | Path, rate: int, longest: float = LONGEST) -> tuple[Tensor, tuple[str, ...]]:
    """A waveform (T,), float32 in [-1, 1], at ``rate``, and what was changed on the way, a sentence each.

    WAV files of 8, 16, 24 or 32 bits are read as they are; what else soundfile knows (FLAC, OGG, MP3), where it is installed.
    Several channels are averaged, another rate is resampled.

    Raises:
        UsageError: There is no such file, it holds no sound, nothing but digital silence, values that are not finite, or more
            than ``longest`` seconds.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path}; a sound is given by the path of its file")
    own, samples = _decoded(path)
    notes = []
    if samples.ndim == 2:
        if samples.shape[1] > 1:
            notes.append(f"{path.name} has {samples.shape[1]} channels, which are averaged: recognisers hear one")
        samples = samples.mean(1)
    _check(path, samples, own, longest)
    if own != rate:
        notes.append(f"{path.name} has {own} samples a second and was resampled to {rate}")
        samples = resample(samples, own, rate)
    return torch.from_numpy(samples.clip(-1, 1).astype(np.float32)), tuple(notes)


def resample(samples: np.ndarray[Any, Any], own: int, rate: int) -> np.ndarray[Any, Any]:
    """Samples (T,) from one rate to another, by a polyphase filter."""
    common = math.gcd(own, rate)
    return np.asarray(resample_poly(samples, rate // common, own // common))


def _decoded(path: Path) -> tuple[int, np.ndarray[Any, Any]]:
    """The rate and the samples, (T,) or (T, channels), float64 in [-1, 1]."""
    if path.suffix.lower() != ".wav":
        return _other(path)
    try:
        with warnings.catch_warnings():
            # Chunks that are not sound are skipped.
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, samples = wavfile.read(path)
    except Exception as error:  # what scipy raises on a damaged file is not one type
        raise UsageError(f"cannot read {path} as a WAV file: {first_line(error)}") from None
    return int(rate), _unit(samples)


def _unit(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers of any width to [-1, 1); floats as they are."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float64)


def _other(path: Path) -> tuple[int, np.ndarray[Any, Any]]:
    try:
        import soundfile
    except ImportError:
        raise UsageError(f"{path} is no WAV file, and others need soundfile: pip install 'advkit[audio]'") from None
    try:
        samples, rate = soundfile.read(path, dtype="float64")
    except Exception as error:  # soundfile raises its own, and RuntimeError
        raise UsageError(f"cannot read {path} as sound: {first_line(error)}") from None
    return int(rate), samples


def _check(path: Path, samples: np.ndarray[Any, Any], rate: int, longest: float) -> None:
    if not len(samples):
        raise UsageError(f"{path} holds no samples; it should hold a sound")
    if rate < 1000 or len(samples) > longest * rate:
        allowed = f"it should have at least 1000 samples a second and last at most {longest:g} s"
        raise UsageError(f"{path} lasts {len(samples) / max(rate, 1):.4g} s at {rate} samples a second; {allowed}")
    if not np.isfinite(samples).all():
        raise UsageError(f"{path} holds NaN or infinite values; samples should be finite")
    if not samples.any():
        raise UsageError(f"{path} holds nothing but digital silence; it should hold a sound")
