"""What happens to a sound on its way to a microphone: rooms, noise, distance, narrow lines, other sample rates.

A transform is called with waveforms x in [-1, 1], with shape (M, T), the random streams, and the numbers of the rows that the
waveforms belong to, with shape (M,). Its result has the shape and range of x, depends on a waveform's own row only, ends
exactly where x ends, and is differentiable in x. What a transform makes of a second of sound depends on ``rate``, the samples a
second. The mean over such transforms is what an attack over the air maximizes (Athalye, Engstrom, Ilyas and Kwok, 2018,
"Synthesizing robust adversarial examples", https://arxiv.org/abs/1707.07397; for speech Qin, Carlini, Goodfellow, Cottrell and
Raffel, 2019, "Imperceptible, robust, and targeted adversarial examples for automatic speech recognition",
https://arxiv.org/abs/1903.10346).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit import spec
from advkit.errors import UsageError
from advkit.sound import wav
from advkit.sound.threats import lengths, sounding
from advkit.streams import Streams

RATE = 16_000
"""Samples a second, where nothing else is said."""

FAINT = 2.0**-31
"""The last sample of a sound that was silenced there: far below a step of 16 bits, and not 0."""


class Sound(Protocol):
    """A change of sounds; frozen data.

    ``random`` says whether it draws anything, ``straight`` whether its gradient is only that of the identity.
    """

    @property
    def random(self) -> bool: ...  # noqa: D102
    @property
    def straight(self) -> bool: ...  # noqa: D102

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """``x`` as heard this time, in [-1, 1], with shape (M, T)."""


def heard(name: str, x: Tensor, z: Tensor) -> Tensor:
    """``z`` in [-1, 1] where ``x`` sounds, and zeros after its end; it ends where ``x`` ends, also where it was silenced there.

    Raises:
        UsageError: x is no batch of waveforms.
    """
    check_waves(name, x)
    z = torch.where(sounding(x), z.clamp(-1, 1), 0.0)
    # Trailing zeros are not heard: with zeros in its last samples a sound would be a shorter one.
    last = torch.arange(x.shape[1], device=x.device) == lengths(x).unsqueeze(1) - 1
    return z + FAINT * (last & (z == 0))


def at(part: Sound, rate: int) -> Sound:
    """A transform for sounds at another rate."""
    return dataclasses.replace(part, rate=rate) if hasattr(part, "rate") else part  # type: ignore[type-var]


def check_waves(name: str, x: Tensor) -> None:
    """Refuse what is no batch of waveforms.

    Raises:
        UsageError: The shape is not (M, T).
    """
    if x.ndim != 2:
        raise UsageError(f"{name} changes sounds (N, T); the inputs have shape {tuple(x.shape)}")


def check_rate(name: str, rate: int) -> None:
    """Refuse a rate at which nobody records."""
    spec.check_whole(f"{name}: rate", rate, 1000)


def size(x: Tensor) -> Tensor:
    """The l_2 norm of each waveform, with shape (M, 1); its gradient at digital silence is 0."""
    return (x.square().sum(1, keepdim=True) + torch.finfo(x.dtype).tiny).sqrt()


def convolved(x: Tensor, h: Tensor, start: int = 0) -> Tensor:
    """Waveforms (M, T) convolved with filters (L,) or (M, L): T samples from sample ``start``, with shape (M, T)."""
    from scipy.fft import next_fast_len

    n = next_fast_len(x.shape[1] + h.shape[-1] - 1, real=True)
    full = torch.fft.irfft(torch.fft.rfft(x, n) * torch.fft.rfft(h.to(x), n), n)
    return full[:, start : start + x.shape[1]]


def play(x: Tensor, rir: Tensor) -> Tensor:
    """Waveforms as they arrive in a room: convolved with an impulse response, cut to their length, at the level they had.

    Arguments:
        x: With shape (M, T) or (T,).
        rir: Impulse responses, as :func:`rooms` makes, with shape (M, L), or (L,) for all.
    """
    if x.ndim == 1:
        return play(x.unsqueeze(0), rir).squeeze(0)
    z = torch.where(sounding(x), convolved(x, rir), 0.0)
    return z * size(x) / size(z)


LEAST = (3.0, 3.0, 2.4)
MOST = (8.0, 6.0, 3.2)
"""The sizes of the smallest and the largest room, in metres."""

WALL = 0.5
"""The least distance from a wall, in metres."""

EARLY = 0.001
"""How many seconds of an impulse response are kept before the direct sound."""


def rooms(n: int, rate: int, rng: torch.Generator, t60: tuple[float, float] = (0.15, 0.3)) -> Tensor:
    """Impulse responses of random rooms, by the image method, with shape (n, L), float32.

    Shoeboxes between :data:`LEAST` and :data:`MOST`, a loudspeaker and a microphone anywhere in each, and a reverberation time
    uniform in ``t60``. The direct sound comes after a thousandth of a second in all; L is the longest reverberation time.

    Allen and Berkley, 1979, "Image method for efficiently simulating small-room acoustics", as pyroomacoustics has it
    (Scheibler, Bezzam and Dokmanic, 2018, https://arxiv.org/abs/1710.04196). Nothing is drawn but from ``rng``.

    Arguments:
        n: How many.
        rate: Samples a second.
        rng: Where the rooms come from.
        t60: The least and the greatest reverberation time, in seconds.

    Raises:
        UsageError: Pyroomacoustics is not installed.
    """
    try:
        import pyroomacoustics
    except ImportError:
        raise UsageError("simulated rooms need pyroomacoustics: pip install pyroomacoustics") from None
    length = round(t60[1] * rate)
    draws = torch.rand(n, 10, generator=rng, dtype=torch.float64)
    return torch.stack([_aligned(_simulated(pyroomacoustics, u, rate, t60), rate, length) for u in draws])


def _simulated(pyroomacoustics: Any, u: Tensor, rate: int, t60: tuple[float, float]) -> Tensor:
    """The impulse response of the room that ten numbers in [0, 1) stand for, with shape (L,)."""
    least, most = (torch.tensor(side, dtype=torch.float64) for side in (LEAST, MOST))
    sides = least + (most - least) * u[:3]
    places = WALL + (sides - 2 * WALL) * u[3:9].view(2, 3)
    absorption, order = pyroomacoustics.inverse_sabine(float(t60[0] + (t60[1] - t60[0]) * u[9]), sides.tolist())
    material = pyroomacoustics.Material(absorption)
    room = pyroomacoustics.ShoeBox(sides.tolist(), fs=rate, materials=material, max_order=order)
    room.add_source(places[0].tolist())
    room.add_microphone(places[1].tolist())
    room.compute_rir()
    return torch.from_numpy(room.rir[0][0])


def _aligned(rir: Tensor, rate: int, length: int) -> Tensor:
    """An impulse response (L,) from shortly before its direct sound, of unit energy, with shape (length,), float32.

    The direct sound is the first sample at least half as large as the largest: others may only be echoes of it.
    """
    loud = rir.abs() >= rir.abs().max() / 2
    start = max(0, int(loud.nonzero()[0]) - round(EARLY * rate))
    cut = rir[start : start + length]
    return F.pad(cut / cut.norm(), (0, length - len(cut))).float()


@functools.lru_cache(maxsize=16)
def _bank(n: int, seed: int, least: float, most: float, rate: int) -> Tensor:
    return rooms(n, rate, torch.Generator().manual_seed(seed), (least, most))


@functools.lru_cache(maxsize=16)
def _recorded(file: str, rate: int) -> Tensor:
    return wav.read(file, rate)[0]


@dataclass(frozen=True)
class Room:
    """Played in a room that is drawn from a bank of simulated ones; other seeds are other rooms.

    :func:`rooms` makes them.

    Arguments:
        rooms: How many rooms there are.
        seed: What they are made from.
        least: The least reverberation time, in seconds, at least 0.15.
        most: The greatest, at most 1.
        rate: Samples a second.
    """

    rooms: int = 8
    seed: int = 0
    least: float = 0.15
    most: float = 0.3
    rate: int = RATE
    random = True
    straight = False

    def __post_init__(self) -> None:
        spec.check_whole("room: rooms", self.rooms, 1)
        spec.check_whole("room: seed", self.seed, 0)
        spec.check_at_least("room: least", self.least, 0.15)
        spec.check_at_least("room: most", self.most, self.least)
        spec.check_between("room: most", self.most)
        check_rate("room", self.rate)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds, each in a room of its own."""
        check_waves("room", x)
        bank = _bank(self.rooms, self.seed, self.least, self.most, self.rate).to(x)
        return heard("room", x, play(x, bank[rng.integers(self.rooms, rows=rows)]))


@dataclass(frozen=True)
class Impulse:
    """Played in the room whose impulse response a file holds; from its direct sound on.

    Arguments:
        file: A sound file.
        rate: Samples a second; the file is resampled.
    """

    file: str
    rate: int = RATE
    random = False
    straight = False

    def __post_init__(self) -> None:
        check_rate("impulse", self.rate)
        _recorded(self.file, self.rate)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds in that room."""
        check_waves("impulse", x)
        rir = _recorded(self.file, self.rate)
        return heard("impulse", x, play(x, _aligned(rir, self.rate, len(rir)).to(x)))


@dataclass(frozen=True)
class Noise:
    """Noise is added at a signal-to-noise ratio: white noise, or a random part of a recording.

    Arguments:
        snr: The ratio of the sound to the noise, in decibels from -100 to 100, over the length of the sound.
        file: A recording of noise; it is repeated where it is shorter than the sound.
        rate: Samples a second; the file is resampled.
    """

    snr: float = 20.0
    file: str = ""
    rate: int = RATE
    random = True
    straight = False

    def __post_init__(self) -> None:
        if not -100 <= self.snr <= 100:
            raise UsageError(f"noise: snr is {self.snr}; it should be from -100 to 100 decibels")
        check_rate("noise", self.rate)
        if self.file:
            _recorded(self.file, self.rate)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The noisy sounds."""
        check_waves("noise", x)
        # A stream of its own, so that what is drawn later does not depend on how long the batch is.
        own = Streams(rng.words((), rows))
        noise = self._part(x, own) if self.file else self._white(x, own)
        noise = torch.where(sounding(x), noise, 0.0)
        return heard("noise", x, x + noise * size(x) / size(noise) * 10 ** (-self.snr / 20))

    def _white(self, x: Tensor, rng: Streams) -> Tensor:
        """Normal, by Box and Muller; both numbers of a sample lie side by side, as above."""
        u = rng.uniform(x.shape[1], 2, dtype=x.dtype)
        return (-2 * torch.log1p(-u[..., 0])).sqrt() * torch.cos(2 * math.pi * u[..., 1])

    def _part(self, x: Tensor, rng: Streams) -> Tensor:
        recorded = _recorded(self.file, self.rate).to(x)
        place = torch.arange(x.shape[1], device=x.device) + rng.integers(len(recorded)).unsqueeze(1)
        return recorded[place % len(recorded)]


@dataclass(frozen=True)
class Gain:
    """Louder or quieter by decibels uniform in [-db, db], cut to [-1, 1].

    Arguments:
        db: The most decibels, from 0 to 100.
    """

    db: float = 6.0
    random = True
    straight = False

    def __post_init__(self) -> None:
        if not 0 <= self.db <= 100:
            raise UsageError(f"gain: db is {self.db}; it should be from 0 to 100 decibels")

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds at another level."""
        check_waves("gain", x)
        u = 2 * rng.uniform(1, rows=rows, dtype=x.dtype) - 1
        return heard("gain", x, x * 10 ** (self.db / 20 * u))


EDGE = 100.0
"""How wide the edge of a band is, in hertz."""


@dataclass(frozen=True)
class Band:
    """Nothing below or above a band, as on a telephone line: a linear-phase filter, without delay.

    Arguments:
        low: Where the band begins, in hertz; 0 for no lower end.
        high: Where it ends; half the rate or more for no upper end.
        rate: Samples a second.
    """

    low: float = 300.0
    high: float = 3400.0
    rate: int = RATE
    random = False
    straight = False

    def __post_init__(self) -> None:
        check_rate("band", self.rate)
        spec.check_at_least("band: low", self.low, 0)
        if not self.low < min(self.high, self.rate / 2):
            allowed = f"it should be less than high and than {self.rate / 2:g}, half the rate"
            raise UsageError(f"band: low is {self.low} and high {self.high}; {allowed}")

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The filtered sounds."""
        check_waves("band", x)
        h = self._filter()
        return heard("band", x, x if h is None else convolved(x, h, len(h) // 2))

    def _filter(self) -> Tensor | None:
        from scipy.signal import firwin

        ends = [end for end in (self.low, self.high) if 0 < end < self.rate / 2]
        if not ends:
            return None
        taps = 2 * round(1.65 * self.rate / EDGE) + 1
        return torch.from_numpy(firwin(taps, ends, pass_zero=self.low == 0, fs=self.rate))


ZEROS = 16
"""How many zeros of the sinc lie on each side of the middle of a resampling filter."""


def check_ratio(name: str, own: int, rate: int) -> None:
    """Refuse two rates that have so little in common that a filter between them does not fit in memory.

    Raises:
        UsageError: In lowest terms, their ratio has too large numbers.
    """
    common = math.gcd(own, rate)
    if own // common * (rate // common) > 10**7:
        raise UsageError(f"{name}: the rates are {own} and {rate}; they should have a greater common divisor than {common}")


def resampled(x: Tensor, own: int, rate: int) -> Tensor:
    """Waveforms (M, T) at ``own`` samples a second at ``rate``, with shape (M, ceil(T rate / own)).

    Each new sample is the sum of the old ones under a sinc with a Hann window, whose band is that of the lower rate (Smith,
    "Digital audio resampling", https://ccrma.stanford.edu/~jos/resample/).
    """
    common = math.gcd(own, rate)
    old, new = own // common, rate // common
    width = math.ceil(ZEROS * max(1.0, old / new))
    fits = -(-x.shape[1] * new // old)
    padded = F.pad(x, (width, width + old))
    weights = _phases(old, new, width).to(x)
    return F.conv1d(padded.unsqueeze(1), weights.unsqueeze(1), stride=old).mT.flatten(1)[:, :fits]


@functools.lru_cache(maxsize=64)
def _phases(old: int, new: int, width: int) -> Tensor:
    """For each of ``new`` samples after a multiple of ``old``, the weights of the samples around it, (new, 2 width + old)."""
    band = min(1.0, new / old)
    place = torch.arange(-width, width + old, dtype=torch.float64)
    distance = (place - torch.arange(new, dtype=torch.float64).unsqueeze(1) * old / new) * band
    window = torch.where(distance.abs() < ZEROS, torch.cos(math.pi / (2 * ZEROS) * distance).square(), 0.0)
    return band * torch.sinc(distance) * window


@dataclass(frozen=True)
class Resample:
    """At a lower rate and back: nothing is left above half of that.

    Arguments:
        to: The lower rate, in samples a second, at least 1000 and less than ``rate``.
        rate: Samples a second of the sounds.
    """

    to: int = 8000
    rate: int = RATE
    random = False
    straight = False

    def __post_init__(self) -> None:
        check_rate("resample", self.rate)
        spec.check_whole("resample: to", self.to, 1000)
        if self.to >= self.rate:
            raise UsageError(f"resample: to is {self.to}; it should be less than {self.rate}, the rate of the sounds")
        check_ratio("resample", self.rate, self.to)

    def __call__(self, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
        """The sounds as they come back."""
        check_waves("resample", x)
        return heard("resample", x, there_and_back(x, self.rate, self.to))


def there_and_back(x: Tensor, rate: int, to: int) -> Tensor:
    """Waveforms (M, T) at ``rate``, at another rate, and back, with shape (M, T)."""
    return resampled(resampled(x, rate, to), to, rate)[:, : x.shape[1]]


AIR: spec.Table = {
    "room": Room,
    "impulse": Impulse,
    "noise": Noise,
    "gain": Gain,
    "band": Band,
    "resample": Resample,
}
"""What happens to sounds on their way."""
