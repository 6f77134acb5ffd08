"""What every recogniser of speech is, and what it is for an attack: a model whose classes are texts.

An oracle compares a model's outputs with labels, which are numbers. Here a label is the number of a text in a table of
phrases, so that every attack of the kernel serves speech as it is: :func:`goal` says when the outputs say a phrase, and what
loss an attack follows towards it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from advkit.audio.text import Exact, Match, normalise
from advkit.errors import ModelError, UsageError, first_line
from advkit.oracle import Access, Goal


class Recogniser(nn.Module):
    """Waveforms (N, T) in [-1, 1] at ``rate`` to outputs (N, ...), of which :meth:`text` is what was heard.

    A subclass has ``forward``, :meth:`text` and, where it gives gradients, :meth:`loss`. Trailing zeros are not heard.

    Attributes:
        rate: Samples a second.
        access: The most that it can answer: LABELS are its texts.
        name: Its spec.
        seconds: The longest sound that it takes.
    """

    rate: int = 16_000
    access: Access = Access.GRADIENTS
    name: str = ""
    seconds: float = 30.0

    def text(self, outputs: Tensor) -> list[str]:
        """What is heard in outputs (N, ...), one normalised text for each row."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, texts: Sequence[str]) -> Tensor:
        """A loss for each row, (N,), low where the outputs say the text.

        Raises:
            UsageError: The recogniser gives no gradients.
        """
        raise UsageError(f"{self.name} answers with texts only; use an attack that needs no more, as in hidden-voice")

    def says(self, outputs: Tensor, texts: Sequence[str]) -> Tensor:
        """Which rows say exactly their text, (N,) bool. A subclass may know without decoding."""
        heard = self.text(outputs)
        same = [normalise(wanted) == said for wanted, said in zip(texts, heard, strict=True)]
        return torch.tensor(same, dtype=torch.bool, device=outputs.device)

    def check_text(self, text: str) -> None:
        """Refuse a text that this recogniser can never say.

        Raises:
            UsageError: It has characters or words that are not the recogniser's.
        """

    @torch.no_grad()
    def transcribe(self, x: Tensor) -> list[str]:
        """What is heard in waveforms (N, T), one normalised text for each; a module is used in evaluation mode."""
        return self.text(self(x))


WIDTH = 4096
"""The most characters of a text that only texts are known of."""


class TextOnly(Recogniser):
    """A recogniser out of a function from one waveform to a text: a service, a program, anything.

    Arguments:
        hear: A waveform (T,), float32 in [-1, 1] without trailing zeros, to a text.
        rate: Samples a second.
        name: What reports call it.
    """

    access = Access.LABELS

    def __init__(self, hear: Callable[[Tensor], str], rate: int = 16_000, name: str = "") -> None:
        super().__init__()
        self.hear, self.rate, self.name = hear, rate, name

    def forward(self, x: Tensor) -> Tensor:
        """The texts as code points, padded with zeros, (N, WIDTH): outputs are tensors."""
        from advkit.sound.threats import lengths

        rows = [self._codes(one[: int(n)]) for one, n in zip(x.detach().float().cpu(), lengths(x), strict=True)]
        return torch.stack(rows).to(x.device)

    def _codes(self, x: Tensor) -> Tensor:
        try:
            said = self.hear(x)
        except UsageError:
            raise
        except Exception as error:  # whatever the user's own code raises
            raise ModelError(f"{self.name or 'the recogniser'} raised {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(said, str):
            raise ModelError(f"{self.name or 'the recogniser'} returned {type(said).__name__}; it should return a text")
        codes = torch.zeros(WIDTH)
        points = torch.tensor([ord(letter) for letter in normalise(said)[:WIDTH]])
        codes[: len(points)] = points
        return codes

    def text(self, outputs: Tensor) -> list[str]:
        """The texts that the code points spell."""
        return ["".join(chr(int(point)) for point in row if point) for row in outputs]


@dataclass(frozen=True, eq=False)
class Phrases:
    """Texts by number, and how a recogniser's outputs are compared with them.

    Arguments:
        recogniser: The recogniser.
        texts: The texts; label y stands for ``texts[y]``.
        match: When what is heard counts as the text.
    """

    recogniser: Any
    texts: tuple[str, ...]
    match: Match = field(default_factory=Exact)

    def of(self, y: Tensor) -> list[str]:
        """The texts of labels (N,)."""
        return [self.texts[k] for k in y.tolist()]

    def says(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Which rows say their text, (N,) bool."""
        if isinstance(self.match, Exact):
            return self.recogniser.says(outputs, self.of(y))
        heard = self.recogniser.text(outputs)
        same = [self.match(wanted, said) for wanted, said in zip(self.of(y), heard, strict=True)]
        return torch.tensor(same, dtype=torch.bool, device=outputs.device)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The recogniser's loss for their texts, (N,)."""
        return self.recogniser.loss(outputs, self.of(y))


def goal(recogniser: Recogniser, texts: Sequence[str], *, targeted: bool = False, match: Match | None = None) -> Goal:
    """A goal whose labels are numbers of texts, for ``advkit.run``.

    Arguments:
        recogniser: The recogniser that is attacked.
        texts: The table of texts.
        targeted: Whether the labels are what should be heard, or what was said.
        match: When what is heard counts as the text; by default, :class:`Exact`. Untargeted with ``Wer(0.8)``, a success has a
            word error rate of more than 0.8.

    Raises:
        UsageError: The recogniser cannot say a target.
    """
    for text in texts if targeted else ():
        recogniser.check_text(text)
    phrases = Phrases(recogniser, tuple(texts), Exact() if match is None else match)
    return Goal(targeted, phrases.says, phrases.loss)
