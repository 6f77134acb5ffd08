"""Hidden voice commands without a look inside the recogniser: a spoken command, mangled as far as it still is obeyed.

Symbols: s is how many times faster than the voice a sound is, its level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.audio.command import Made
from advkit.audio.recogniser import Recogniser
from advkit.audio.synthesis import PEAK, VOICES, installed, speak
from advkit.audio.text import cer, check_said, wer
from advkit.errors import UsageError
from advkit.oracle import Access
from advkit.sound.features import mangled
from advkit.sound.threats import lengths
from advkit.sound.wav import quantised
from advkit.spec import check_whole, unknown

WINDOWS, HOPS, CEPSTRA, BANDS = (0.016, 0.025, 0.04), (0.01, 0.02), (8, 13, 20), (20, 40)
"""What features are taken with: the lengths of a frame and of a hop, in seconds, and how many numbers are kept."""

SLOWEST, FIRST, FASTEST = 0.9, 2.5, 5.0
"""The levels: the least, where a voice begins, and the most."""

UP, DOWN = 1.3, 1.1
"""What a level is multiplied by when a sound of it is obeyed, and divided by when it is not: a quarter of them are."""

ENOUGH = 0.9
"""How badly the listener should hear a sound for the search to end."""

GRAIN = 0.032
"""The length of the pieces that a faster sound is put together from, in seconds: a few periods of a voice."""


@dataclass(frozen=True)
class Mangle:
    """A command is said faster, reduced to a few cepstra and made out of noise again; the recogniser says when it is too much.

    Carlini, Mishra, Vaidya, Zhang, Sherr, Shields, Wagner and Zhou, 2016, "Hidden voice commands", USENIX Security,
    https://www.usenix.org/conference/usenixsecurity16/technical-sessions/presentation/carlini, the black-box attack, after
    Vaidya, Zhang, Sherr and Shields, 2015, "Cocaine noodles: exploiting the gap between human and machine speech recognition",
    WOOT, https://www.usenix.org/conference/woot15/workshop-program/presentation/vaidya.

    How degraded a sound is, is how many times faster than its voice it is (as in Abdullah et al., 2019,
    https://arxiv.org/abs/1904.05734): of all the settings, other recognisers suffer from this one most. A query is for the
    voice of the highest level, with a window, a hop, numbers of cepstra and bands, and noise drawn at random. A sound that is
    obeyed raises the voice's level, another one lowers it. Sounds that are obeyed are played to the listener, and the one
    that it hears worst is taken (the mean of its word and its character error rate, each 1 at most); it ends the search
    when that is 0.9. Without a listener, the fastest is taken. When none is obeyed, the result is the sound that came
    closest in words.

    Arguments:
        queries: How many sounds the recogniser may be asked about.
        voices: Synthesised voices that say the command besides the voice given, by their names in
            ``advkit.audio.synthesis.VOICES``, separated by commas; ``all`` for all that are installed.

    Raises:
        UsageError: There are no queries, or no such voice.
    """

    queries: int = 100
    voices: str = "all"
    access = Access.LABELS
    paper = "Carlini et al. 2016"
    needs_voice = True

    def __post_init__(self) -> None:
        check_whole("mangle: queries", self.queries, 1)
        for name in () if self.voices == "all" else self._named():
            if name not in VOICES:
                raise unknown("voice", name, VOICES)

    def make(
        self,
        text: str,
        recogniser: Recogniser,
        *,
        voice: Tensor | None = None,
        listener: Recogniser | None = None,
        rng: torch.Generator,
    ) -> Made:
        """The sound; see :class:`advkit.audio.command.CommandAttack`.

        Raises:
            UsageError: There is no voice, it is silent, the recogniser cannot say the text, or the listener has another rate.
        """
        wanted = check_said(text)
        recogniser.check_text(wanted)
        if listener is not None and listener.rate != recogniser.rate:
            raise UsageError(f"the listener hears {listener.rate} samples a second and the recogniser {recogniser.rate}")
        voices = self._voices(wanted, recogniser.rate, voice)
        levels, best, rank = [FIRST] * len(voices), voices[0], (False, -math.inf, 0.0)
        n = 0
        while n < self.queries and rank < (True, ENOUGH):
            n += 1
            k = max(range(len(voices)), key=levels.__getitem__)
            x, s = _mangled(voices[k], levels[k], recogniser.rate, rng), levels[k]
            heard = recogniser.transcribe(x.unsqueeze(0))[0]
            obeyed = heard == wanted
            score = _unheard(wanted, x, listener) if obeyed else -wer(wanted, heard)
            if (obeyed, score, s) > rank:
                best, rank = x, (obeyed, score, s)
            levels[k] = min(max(s * UP if obeyed else s / DOWN, SLOWEST), FASTEST)
        return Made(best, queries=n)

    def _named(self) -> Sequence[str]:
        if self.voices == "all":
            return installed()
        return [name.strip() for name in self.voices.split(",") if name.strip()]

    def _voices(self, wanted: str, rate: int, voice: Tensor | None) -> list[Tensor]:
        """The voices, without the silence at their ends, each once."""
        given = [] if voice is None else [voice]
        found: list[Tensor] = []
        for x in [*given, *(speak(wanted, rate, name) for name in self._named())]:
            if not any(torch.equal(_trimmed(x), other) for other in found):
                found.append(_trimmed(x))
        if not found:
            raise UsageError("mangle has no voice that says the command; give one, or apt-get install flite")
        if not all(map(len, found)):
            raise UsageError("the voice is digital silence; it should say the command")
        return found


def _mangled(voice: Tensor, s: float, rate: int, rng: torch.Generator) -> Tensor:
    """A voice at a level, with settings and noise drawn at random, as a file holds it."""
    window, hop, cepstra, bands = (_drawn(choices, rng) for choices in (WINDOWS, HOPS, CEPSTRA, BANDS))
    x = mangled(faster(voice, s, rate), rate, window=window, hop=hop, cepstra=int(cepstra), bands=int(bands), rng=rng)
    return quantised(x * (PEAK / x.abs().amax().clamp(min=1e-9)))


def _drawn(choices: Sequence[float], rng: torch.Generator) -> float:
    return choices[int(torch.randint(len(choices), (), generator=rng))]


def faster(x: Tensor, s: float, rate: int) -> Tensor:
    """A sound said s times faster, (T / s,): its pieces are put nearer each other, and the pitch stays.

    Arguments:
        x: The waveform, (T,).
        s: How many times, greater than 0.
        rate: Samples a second.
    """
    half = round(GRAIN / 2 * rate)
    step = max(1, round(half * s))
    frames = max(1, -(-len(x) // step))
    window = torch.hann_window(2 * half, dtype=x.dtype)
    pieces = F.pad(x, (half, step * frames + half - len(x))).unfold(0, 2 * half, step) * window
    joined = F.fold(pieces.T.unsqueeze(0), (1, half * (len(pieces) + 1)), (1, 2 * half), stride=(1, half))
    return joined.flatten()[half : half + round(len(x) / s)]


def _unheard(wanted: str, x: Tensor, listener: Recogniser | None) -> float:
    """How badly the listener hears a sound: the mean of two error rates, each 1 at most; 0 without a listener."""
    if listener is None:
        return 0.0
    heard = listener.transcribe(x.unsqueeze(0))[0]
    return (min(1.0, wer(wanted, heard)) + min(1.0, cer(wanted, heard))) / 2


def _trimmed(x: Tensor) -> Tensor:
    return x[: int(lengths(x.unsqueeze(0)))]
