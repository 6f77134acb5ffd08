"""PocketSphinx as a recogniser: a black box whose acoustic model can be opened.

D. Huggins-Daines et al., 2006, "PocketSphinx: a free, real-time continuous speech recognition system for hand-held devices",
ICASSP, https://github.com/cmusphinx/pocketsphinx, with the US English model that its package carries.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from advkit.audio.recogniser import TextOnly
from advkit.audio.senones import RATE, AcousticModel, acoustic_model
from advkit.audio.sphinx_files import read_dictionary
from advkit.audio.text import check_said, normalise
from advkit.errors import UsageError
from advkit.sound.wav import LONGEST, STEPS, quantised
from advkit.spec import Table, check_positive, parse, show

CHUNK = 2048
"""How many samples a streaming decoder is given at a time, 128 ms."""

SCALE = 1024
"""Scores are logarithms divided by 1024."""

CLOSED = "a closed grammar hears one of its phrases in nearly any speech: that it heard a command proves nothing"
SPOTTING = "a keyphrase is heard or not: its threshold decides how often other speech passes for it"


@dataclass(frozen=True)
class Settings:
    """How PocketSphinx listens; by default with its full language model, to whole sounds.

    Arguments:
        streaming: Whether it hears the sound in pieces of 128 ms, with the cepstral mean of a decoder that has heard nothing
            yet, rather than at once.
        grammar: The phrases that it may hear, separated by ``|``, instead of the language model. It then hears one of them
            in nearly any speech, which proves nothing.
        keyphrase: The one phrase that it waits for, instead of the language model.
        threshold: How likely the keyphrase should be against other speech; the smaller, the more passes for it.

    Raises:
        UsageError: A grammar and a keyphrase are given, a phrase is empty, or the threshold is not positive.
    """

    streaming: bool = False
    grammar: str = ""
    keyphrase: str = ""
    threshold: float = 1e-20

    def __post_init__(self) -> None:
        if self.grammar and self.keyphrase:
            raise UsageError("pocketsphinx was given a grammar and a keyphrase; it listens for one of them")
        check_positive("pocketsphinx: threshold", self.threshold)
        for phrase in self.phrases:
            check_said(phrase)

    @property
    def phrases(self) -> tuple[str, ...]:
        """What may be heard, normalised; nothing is any words."""
        if not self.grammar:
            return (normalise(self.keyphrase),) if self.keyphrase else ()
        return tuple(normalise(phrase) for phrase in self.grammar.split("|"))


SPHINX: Table = {"pocketsphinx": Settings}


@dataclass(frozen=True)
class Hypothesis:
    """What a sound may have said.

    Attributes:
        text: The words, normalised.
        score: The logarithm of its likelihood, acoustic and of the language, in nats; comparable within one sound.
    """

    text: str
    score: float


class PocketSphinx(TextOnly):
    """The recogniser, asked as a stock decoder that has heard nothing before.

    A decoder carries the cepstral mean, the noise estimate and the kind of normalisation from one sound to the next, which
    changes its answers. Here the front end is made anew for each sound; what is heard, its scores and its word times are then
    those of a decoder loaded for that sound.

    It answers with LABELS, its texts; :meth:`hypotheses` has several texts with scores for one sound, and
    :meth:`acoustic_model` is what a white-box attack needs.

    Arguments:
        settings: How it listens.

    Raises:
        UsageError: pocketsphinx is not installed, or a phrase has words that are not in its dictionary.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = Settings() if settings is None else settings
        super().__init__(self._hear, RATE, show(self.settings, SPHINX))
        self.seconds = LONGEST
        self.folder = Path(_package().get_model_path()) / "en-us"
        for phrase in self.settings.phrases:
            self._check_words(phrase)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its answers should know, a sentence each."""
        closed = (CLOSED,) if self.settings.grammar else ()
        return (*closed, SPOTTING) if self.settings.keyphrase else closed

    @property
    def dictionary(self) -> Path:
        """The file of pronunciations."""
        return self.folder / "cmudict-en-us.dict"

    def acoustic_model(self) -> AcousticModel:
        """The acoustic model in torch, with gradients, from the files that the decoder reads."""
        return acoustic_model(self.folder / "en-us", self.dictionary)

    def check_text(self, text: str) -> None:
        """Refuse a text that cannot be heard.

        Raises:
            UsageError: It has words that are not in the dictionary, or is none of the phrases that are listened for.
        """
        said = check_said(text)
        phrases = self.settings.phrases
        if phrases and said not in phrases:
            raise UsageError(f"{self.name} can hear {', '.join(map(repr, phrases))}, never {said!r}")
        self._check_words(said)

    def _check_words(self, said: str) -> None:
        words = read_dictionary(self.dictionary)
        missing = [word for word in said.split() if word not in words]
        if missing:
            close = difflib.get_close_matches(missing[0], words, n=1, cutoff=0.75)
            hint = f" (close to {missing[0]!r} is {close[0]!r})" if close else ""
            raise UsageError(f"not in PocketSphinx's dictionary: {', '.join(missing)}{hint}; use words that it has")

    @cached_property
    def _decoder(self) -> Any:
        kind, phrases = _package().Decoder, self.settings.phrases
        if self.settings.keyphrase:
            return kind(loglevel="FATAL", keyphrase=phrases[0], kws_threshold=self.settings.threshold)
        if not phrases:
            return kind(loglevel="FATAL")
        decoder = kind(loglevel="FATAL", lm=None)
        decoder.add_jsgf_string("phrases", f"#JSGF V1.0; grammar phrases; public <phrase> = {' | '.join(phrases)};")
        decoder.activate_search("phrases")
        return decoder

    def _decode(self, x: Tensor) -> None:
        """Decode a waveform (T,) as a fresh decoder would."""
        if len(x) > self.seconds * RATE:
            raise UsageError(f"the sound lasts {len(x) / RATE:.4g} s; PocketSphinx is given at most {self.seconds:g} s")
        # A phrase that is waited for is reported a little after it ends.
        after = RATE // 2 if self.settings.keyphrase else 0
        data = torch.nn.functional.pad((quantised(x.double()) * STEPS).to(torch.int16), (0, after)).numpy()
        size = CHUNK if self.settings.streaming else max(1, len(data))
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        for start in range(0, len(data), size):
            self._decoder.process_raw(data[start : start + size].tobytes(), False, not self.settings.streaming)
        self._decoder.end_utt()

    def _hear(self, x: Tensor) -> str:
        self._decode(x)
        found = self._decoder.hyp()
        if found is None:
            return ""
        return self.settings.phrases[0] if self.settings.keyphrase else str(found.hypstr)

    def hypotheses(self, x: Tensor, most: int = 10) -> list[Hypothesis]:
        """What one waveform (T,) may have said, the most likely first; nothing in keyphrase mode.

        Arguments:
            x: The waveform, in [-1, 1].
            most: How many distinct texts to give at most.
        """
        self._decode(x)
        found: dict[str, float] = {}
        for one in () if self.settings.phrases else self._decoder.nbest():
            if len(found) == most:
                break
            if one is not None and one.score > 0:
                found.setdefault(normalise(one.hypstr), math.log(one.score) * SCALE)
        ranked = sorted(found.items(), key=lambda item: -item[1])
        return [Hypothesis(text, score) for text, score in ranked]


def _package() -> ModuleType:
    try:
        import pocketsphinx
    except ImportError:
        raise UsageError("this recogniser needs pocketsphinx; pip install pocketsphinx==5.1.1") from None
    return pocketsphinx


def load(spec: str) -> PocketSphinx:
    """The recogniser of a spec: ``pocketsphinx``, ``pocketsphinx(streaming=true)``, ``pocketsphinx(grammar="yes | no")``.

    Raises:
        UsageError: The spec names another recogniser or an unknown setting, or pocketsphinx is not installed.
    """
    return PocketSphinx(parse(spec, SPHINX, "recogniser"))
