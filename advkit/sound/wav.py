"""Sound in files: read as mono at one rate, written as 16-bit WAV.

A success is what a file holds: waveforms are decided on after :func:`quantised`, which is what writing and reading does.
Scipy is imported when a file is read or written: it takes the better part of a second, and every threat model comes by here.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from advkit.errors import UsageError, first_line

LONGEST = 120.0
"""The most seconds that a sound may last: a recogniser takes a sentence, not a recording of an hour."""

RATES = (1_000, 384_000)
"""The fewest and the most samples a second."""

CHANNELS = 32
"""The most channels."""

STEPS = 32768
"""The steps of 16 bits on each side of zero."""

WAVE = (b"RIFF", b"RIFX", b"RF64")
"""What a WAV file begins with."""

PLAIN = (1, 3, 0xFFFE)
"""The formats of a WAV file that are numbers as they are: whole, floating, and either of them with a longer header."""


def quantised(x: Tensor) -> Tensor:
    """``x`` as a 16-bit file holds it: multiples of 1/32768 from -1 to 1 - 1/32768, with the shape and dtype of x."""
    return (x * STEPS).round().clamp(-STEPS, STEPS - 1) / STEPS


def write(path: str | Path, x: Tensor, rate: int) -> None:
    """Write a waveform (T,) in [-1, 1] as a mono WAV file of 16 bits."""
    from scipy.io import wavfile

    whole = (quantised(x.detach().cpu().double()) * STEPS).to(torch.int16)
    wavfile.write(path, rate, whole.numpy())


@dataclass(frozen=True)
class Decoded:
    """A sound as its file holds it.

    Attributes:
        samples: The mean of the channels, (T,), float64 in [-1, 1].
        rate: Samples a second.
        channels: How many the file has.
    """

    samples: np.ndarray[Any, Any]
    rate: int
    channels: int

    def at(self, rate: int) -> Tensor:
        """The waveform (T,), float32 in [-1, 1], at a rate."""
        samples = self.samples if rate == self.rate else resample(self.samples, self.rate, rate)
        return torch.from_numpy(samples.clip(-1, 1).astype(np.float32))


def decode(content: bytes, name: str, longest: float = LONGEST) -> Decoded:
    """The sound that the bytes of a file hold; ``name`` is what to call it in a message.

    Raises:
        UsageError: As in :func:`read`.
    """
    return _decode(io.BytesIO(content), name, longest)


def read(path: str | Path, rate: int, longest: float = LONGEST) -> tuple[Tensor, tuple[str, ...]]:
    """A waveform (T,), float32 in [-1, 1], at ``rate``, and what was changed on the way, a sentence each.

    WAV files of 8, 16, 24 or 32 bits are read as they are; what else soundfile knows (FLAC, OGG, MP3, mu-law), where it is
    installed. What a file is, its first bytes say, not its name; one that says that it is too long is not decoded. Several
    channels are averaged, another rate is resampled.

    Raises:
        UsageError: There is no such file, it holds no sound, nothing but digital silence, values that are not finite, more
            than ``longest`` seconds, or more channels or samples a second than any sound has.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path}; a sound is given by the path of its file")
    with path.open("rb") as file:
        sound = _decode(file, str(path), longest)
    notes = []
    if sound.channels > 1:
        notes.append(f"{path.name} has {sound.channels} channels, which are averaged: recognisers hear one")
    if sound.rate != rate:
        notes.append(f"{path.name} has {sound.rate} samples a second and was resampled to {rate}")
    return sound.at(rate), tuple(notes)


def resample(samples: np.ndarray[Any, Any], own: int, rate: int) -> np.ndarray[Any, Any]:
    """Samples (T,) from one rate to another, by a polyphase filter."""
    from scipy.signal import resample_poly

    common = math.gcd(own, rate)
    return np.asarray(resample_poly(samples, rate // common, own // common))


def _decode(file: BinaryIO, name: str, longest: float) -> Decoded:
    head = _head(file)
    file.seek(0)
    if head is None or head[0] not in PLAIN:
        rate, samples = _other(file, name, longest)
    else:
        _check_size(name, *head[1:], longest)
        rate, samples = _plain(file, name)
    channels = samples.shape[1] if samples.ndim == 2 else 1
    samples = samples.mean(1) if samples.ndim == 2 else samples
    _check_size(name, len(samples), rate, channels, longest)
    _check_samples(name, samples)
    return Decoded(samples, rate, channels)


def _head(file: BinaryIO) -> tuple[int, int, int, int] | None:
    """What a WAV file says of itself: its format, samples a channel, rate and channels; None where the file is none."""
    first = file.read(12)
    if first[:4] not in WAVE:
        return None
    order, about, size = ">" if first[:4] == b"RIFX" else "<", b"", 0
    while len(chunk := file.read(8)) == 8:
        name, size = struct.unpack(f"{order}4sI", chunk)
        if name == b"data":
            break
        begin = file.tell()
        about = file.read(14) if name == b"fmt " else about
        file.seek(begin + size + size % 2)
    if len(about) < 14:
        # Whoever decodes it says what is wrong.
        return PLAIN[0], 0, RATES[0], 1
    kind, channels, rate, _, align = struct.unpack(f"{order}HHIIH", about)
    # However much it promises, a file holds no more than it has.
    there = min(size, -file.tell() + file.seek(0, io.SEEK_END))
    return kind, max(0, there) // max(1, align), rate, channels


def _plain(file: BinaryIO, name: str) -> tuple[int, np.ndarray[Any, Any]]:
    """The rate and the samples, (T,) or (T, channels), float64 in [-1, 1]."""
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            # Chunks that are not sound are skipped.
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, samples = wavfile.read(file)
    except Exception as error:  # what scipy raises on a damaged file is not one type
        raise UsageError(f"cannot read {name} as a WAV file: {first_line(error)}") from None
    return int(rate), _unit(samples)


def _unit(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers of any width to [-1, 1); floats as they are."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float64)


def _other(file: BinaryIO, name: str, longest: float) -> tuple[int, np.ndarray[Any, Any]]:
    try:
        import soundfile
    except ImportError:
        raise UsageError(f"{name} is no plain WAV file, and others need soundfile: pip install 'advkit[audio]'") from None
    try:
        with soundfile.SoundFile(file) as sound:
            _check_size(name, sound.frames, sound.samplerate, sound.channels, longest)
            return sound.samplerate, sound.read(dtype="float64")
    except (soundfile.SoundFileError, RuntimeError) as error:
        why = getattr(error, "error_string", None) or first_line(error)
        raise UsageError(f"cannot read {name} as sound: {why}") from None


def _check_size(name: str, n: int, rate: int, channels: int, longest: float) -> None:
    least, most = RATES
    if not least <= rate <= most or n > longest * rate:
        allowed = f"it should have {least} to {most} samples a second and last at most {longest:g} s"
        raise UsageError(f"{name} lasts {n / max(rate, 1):.4g} s at {rate} samples a second; {allowed}")
    if channels > CHANNELS:
        raise UsageError(f"{name} has {channels} channels; it should have at most {CHANNELS}")


def _check_samples(name: str, samples: np.ndarray[Any, Any]) -> None:
    if not len(samples):
        raise UsageError(f"{name} holds no samples; it should hold a sound")
    if not np.isfinite(samples).all():
        raise UsageError(f"{name} holds NaN or infinite values; samples should be finite")
    if not samples.any():
        raise UsageError(f"{name} holds nothing but digital silence; it should hold a sound")
