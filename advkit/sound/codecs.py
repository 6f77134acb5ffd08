"""What a file or a line does to a sound: encoded and decoded by libsndfile, at the length and place that it had.

Codecs are transforms as in :mod:`advkit.sound.air`. They have no gradient; that of the identity stands in for it (the
straight-through estimator), so that an attack can look through them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkit import spec
from advkit.errors import UsageError, first_line
from advkit.sound.air import RATE, check_rate, check_ratio, check_waves, heard, resampled
from advkit.sound.threats import lengths
from advkit.streams import Streams


def _coded(name: str, x: Tensor, rate: int, **how: Any) -> Tensor:
    """The sounds as they come out of a file, (M, T), with the gradient of x.

    Arguments:
        name: Of the codec.
        x: Waveforms (M, T) in [-1, 1].
        rate: Samples a second.
        how: What soundfile is told.
    """
    check_waves(name, x)
    z = torch.zeros_like(x, requires_grad=False)
    for row, (one, n) in enumerate(zip(x.detach().cpu(), lengths(x).tolist(), strict=True)):
        if n:
            z[row, :n] = torch.from_numpy(_decoded(name, one[:n].float().numpy(), rate, how)).to(z)
    return heard(name, x, x + (z - x).detach())


def _decoded(name: str, samples: np.ndarray[Any, Any], rate: int, how: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What comes back for samples (T,), with shape (T,)."""
    try:
        import soundfile
    except ImportError:
        raise UsageError(f"{name} needs soundfile: pip install 'advkit[audio]'") from None
    file = io.BytesIO()
    try:
        soundfile.write(file, samples, rate, **how)
        file.seek(0)
        back, _ = soundfile.read(file, dtype="float32")
    except Exception as error:  # an older libsndfile does not know the format, or the codec not the rate
        why = first_line(error).rpartition(" : ")[2]  # before it stands the address of the buffer
        raise UsageError(f"{name}: soundfile cannot code {rate} samples a second: {why}") from None
    late = DELAY if name == "mp3" and len(back) > len(samples) else 0
    back = back[late : late + len(samples)]
    return np.pad(back, (0, len(samples) - len(back)))


DELAY = 1105
"""By how many samples an MP3 file is late whose frames are too short to say how long the sound is."""

BITRATES = (16, 24, 32, 40, 48, 56, 64)
"""The bit rates that MP3 has at all of the rates of speech, in kbit/s."""


@dataclass(frozen=True)
class MP3:
    """Saved as MP3 and read back.

    Arguments:
        kbps: The bit rate, in kbit/s, one of :data:`BITRATES`.
        rate: Samples a second, less than 32000, such as 8000 or 16000.
    """

    kbps: int = 32
    rate: int = RATE
    random = False
    straight = True

    def __post_init__(self) -> None:
        if self.kbps not in BITRATES:
            raise UsageError(f"mp3: kbps is {self.kbps}; it should be one of {', '.join(map(str, BITRATES))}")
        check_rate("mp3", self.rate)
        if self.rate >= 32_000:
            raise UsageError(f"mp3: rate is {self.rate}; it should be less than 32000, as for speech")

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds as read back."""
        most = 160 if self.rate >= 16_000 else 64
        level = min((most - self.kbps) / (most - 8), 0.999)
        how = {"format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": level, "bitrate_mode": "CONSTANT"}
        return _coded("mp3", x, self.rate, **how)


OPUS_RATES = (8000, 12_000, 16_000, 24_000, 48_000)
"""The samples a second that Opus knows."""


@dataclass(frozen=True)
class Opus:
    """Sent as Opus, as calls over the internet are.

    Arguments:
        kbps: The bit rate, in kbit/s, from 6 to 256.
        rate: Samples a second, one of :data:`OPUS_RATES`.
    """

    kbps: int = 16
    rate: int = RATE
    random = False
    straight = True

    def __post_init__(self) -> None:
        if not 6 <= self.kbps <= 256:
            raise UsageError(f"opus: kbps is {self.kbps}; it should be from 6 to 256")
        if self.rate not in OPUS_RATES:
            raise UsageError(f"opus: rate is {self.rate}; it should be one of {', '.join(map(str, OPUS_RATES))}")

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds as they arrive."""
        return _coded("opus", x, self.rate, format="OGG", subtype="OPUS", compression_level=(256 - self.kbps) / 250)


@dataclass(frozen=True)
class Vorbis:
    """Saved as Ogg Vorbis and read back.

    Arguments:
        quality: From 0 to 1.
        rate: Samples a second.
    """

    quality: float = 0.3
    rate: int = RATE
    random = False
    straight = True

    def __post_init__(self) -> None:
        spec.check_between("vorbis: quality", self.quality)
        check_rate("vorbis", self.rate)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds as read back."""
        return _coded("vorbis", x, self.rate, format="OGG", subtype="VORBIS", compression_level=1 - self.quality)


LINE = 8000
"""The samples a second of a telephone line."""


@dataclass(frozen=True)
class GSM:
    """Over a mobile telephone: GSM full rate, 13 kbit/s, at 8000 samples a second.

    Arguments:
        rate: Samples a second of the sounds; they are resampled on the way there and back.
    """

    rate: int = RATE
    random = False
    straight = True

    def __post_init__(self) -> None:
        check_rate("gsm", self.rate)
        check_ratio("gsm", self.rate, LINE)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds as they arrive."""
        check_waves("gsm", x)
        line = _coded("gsm", resampled(x, self.rate, LINE), LINE, format="WAV", subtype="GSM610")
        return heard("gsm", x, resampled(line, LINE, self.rate)[:, : x.shape[1]])


CODECS: spec.Table = {"mp3": MP3, "opus": Opus, "vorbis": Vorbis, "gsm": GSM}
"""The codecs."""
