"""Detection by comparing transcripts: what was said survives a change of the sound, what was put there often does not.

Symbols: x is a batch of waveforms (N, T), t_i are changes of sounds, f(x) is what a recogniser hears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.audio.recogniser import Recogniser
from advkit.audio.text import cer
from advkit.defenses.audio.defended import Ear
from advkit.errors import UsageError
from advkit.sound.air import Sound, at
from advkit.sound.threats import lengths
from advkit.spec import check_share, check_whole, parse
from advkit.transforms import SOUNDS


@dataclass(frozen=True)
class Transcripts:
    """The score is the greatest character error rate between f(x) and f(t_i(x)), cut at 1.

    Rajaratnam, Shah and Kalita, 2018, "Isolated and ensemble audio preprocessing methods for detecting adversarial examples
    against automatic speech recognition", https://arxiv.org/abs/1809.04397. With ``half``, what is heard in the first half of
    a sound is compared with as many characters of the whole: the temporal dependency of Yang, Li, Chen and Song, 2019,
    "Characterizing audio adversarial examples using temporal dependency", https://arxiv.org/abs/1809.10875.

    Arguments:
        views: The changes t_i, of ``advkit.transforms.SOUNDS``, apart by spaces: ``noise(25) quantise(63)``.
        half: Whether the first half is compared as well.
        alarms: The share of clean sounds that may be suspected, in [0, 1).
        seed: Of what the changes draw.

    Raises:
        UsageError: There is nothing to compare, or a setting is wrong.
    """

    views: str = "noise(25) quantise(63)"
    half: bool = False
    alarms: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("transcripts: alarms", self.alarms)
        check_whole("transcripts: seed", self.seed, 0)
        if not self.views.split() and not self.half:
            raise UsageError("transcripts: there is nothing to compare; name a view, as in views='resample(4000)'")
        self._changes()

    def fit(self, recogniser: Recogniser, x: Tensor) -> Compared:
        """The detector, with the least threshold that lets all but ``alarms`` of clean sounds (N, T) pass.

        Raises:
            UsageError: There are no sounds.
        """
        if not len(x):
            raise UsageError("transcripts were given no clean sounds to learn a threshold from; they need at least one")
        compared = Compared(self, recogniser)
        compared.threshold = float(compared(x).quantile(1 - self.alarms, interpolation="higher"))
        return compared

    def ears(self, recogniser: Recogniser, guided: bool) -> nn.ModuleList:
        """The changes as layers, and the half, for sounds at the recogniser's rate."""
        changes = [at(change, recogniser.rate) for change in self._changes()]
        made: list[nn.Module] = [Ear(change, self.seed + 2 * k, guided) for k, change in enumerate(changes)]
        return nn.ModuleList([*made, Half()] if self.half else made)

    def _changes(self) -> list[Sound]:
        return [parse(text, SOUNDS, "view") for text in self.views.split()]


class Half(nn.Module):
    """The first half of each sound, with zeros after it."""

    def forward(self, x: Tensor) -> Tensor:
        """With shape (N, T)."""
        place = torch.arange(x.shape[1], device=x.device)
        return torch.where(place < (lengths(x) // 2).unsqueeze(1), x, 0.0)


class Compared(nn.Module):
    """The detector: waveforms (N, T) to scores (N,) in [0, 1], of which those above the threshold are suspicious.

    Attributes:
        threshold: The greatest score that passes.
    """

    def __init__(self, settings: Transcripts, recogniser: Recogniser) -> None:
        super().__init__()
        self.settings, self.recogniser = settings, recogniser
        self.ears = settings.ears(recogniser, guided=False)
        self.threshold = 1.0

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The scores; nothing of them has a gradient, as texts have none."""
        whole = self.recogniser.transcribe(x)
        rows = [self._changes(ear, whole, self.recogniser.transcribe(ear(x))) for ear in self.ears]
        return torch.tensor(rows, dtype=torch.float64, device=x.device).amax(0)

    def _changes(self, ear: nn.Module, whole: list[str], heard: list[str]) -> list[float]:
        if isinstance(ear, Half):
            whole = [one[: len(part)] for one, part in zip(whole, heard, strict=True)]
        return [_rate(one, other) for one, other in zip(whole, heard, strict=True)]

    def suspected(self, x: Tensor) -> Tensor:
        """Which sounds are, (N,) bool."""
        return self(x) > self.threshold

    def agreeing(self) -> Agreeing:
        """The recogniser that an attack should fool to go unnoticed."""
        return Agreeing(self.settings, self.recogniser)


def _rate(wanted: str, heard: str) -> float:
    """The character error rate, at most 1; nothing against nothing is 0."""
    return min(1.0, cer(wanted, heard)) if wanted and heard else float(wanted != heard)


class Agreeing(Recogniser):
    """A recogniser that hears x and every t_i(x), and says a text where all of them do: the adaptive attack's model.

    An attack that makes it say a target keeps the transcript through the changes, so a comparison sees nothing. Where the
    first half is heard as well, it should say the first half of the words. Outputs are those of the recogniser, one change
    after the other along a new axis, (N, V, ...); the loss is the mean.

    Arguments:
        settings: What is compared.
        recogniser: Who hears it.
    """

    def __init__(self, settings: Transcripts, recogniser: Recogniser) -> None:
        super().__init__()
        self.recogniser, self.ears = recogniser, settings.ears(recogniser, guided=True)
        self.rate, self.access, self.name = recogniser.rate, recogniser.access, recogniser.name
        self.seconds = recogniser.seconds

    def forward(self, x: Tensor) -> Tensor:
        """The outputs for x and for each change of it."""
        return torch.stack([self.recogniser(x), *(self.recogniser(ear(x)) for ear in self.ears)], 1)

    def text(self, outputs: Tensor) -> list[str]:
        """What is heard in the sounds themselves."""
        return self.recogniser.text(outputs[:, 0])

    def loss(self, outputs: Tensor, texts: Sequence[str]) -> Tensor:
        """The mean of the recogniser's losses, (N,)."""
        parts = zip(outputs.unbind(1), self._texts(texts), strict=True)
        return torch.stack([self.recogniser.loss(one, said) for one, said in parts]).mean(0)

    def says(self, outputs: Tensor, texts: Sequence[str]) -> Tensor:
        """Where all of them say the text."""
        parts = zip(outputs.unbind(1), self._texts(texts), strict=True)
        return torch.stack([self.recogniser.says(one, said) for one, said in parts]).all(0)

    def check_text(self, text: str) -> None:
        """The recogniser's."""
        self.recogniser.check_text(text)

    def _texts(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """What each of them should say."""
        words = [text.split() for text in texts]
        first = [" ".join(some[: (len(some) + 1) // 2]) for some in words]
        return [texts, *(first if isinstance(ear, Half) else texts for ear in self.ears)]
