"""A recogniser behind a defense that changes what it hears, and the attack that knows of the defense.

Symbols: x is a batch of waveforms (N, T) in [-1, 1], t(x) what the recogniser hears in place of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from advkit.audio.recogniser import Recogniser
from advkit.defenses.inference.defended import Random, adaptive, opaque
from advkit.engine import Attack
from advkit.sound.air import Sound, at
from advkit.streams import Streams

DRAWS = 10
"""Of how many answers an adaptive attack takes the mean, where a defense draws."""


class Ear(Random):
    """The layer that hears t(x) in place of x.

    Arguments:
        change: t.
        seed: Of its draws.
        guided: Whether what has no gradient has that of the identity: for an attack, not for what is deployed.
    """

    def __init__(self, change: Sound, seed: int = 0, guided: bool = False) -> None:
        super().__init__(seed + guided, DRAWS if change.random else 1)
        self.change, self.seed, self.guided = change, seed, guided

    def forward(self, x: Tensor) -> Tensor:
        """t(x), with shape (N, T)."""
        streams = Streams(self.dice.throw(x).keys)
        z = self.change(x, streams, torch.arange(len(x), device=x.device))
        return opaque(z, x) if self.change.straight and not self.guided else z

    def stand_in(self) -> Ear | None:
        """The same with the gradient of the identity (BPDA) where t has none."""
        return Ear(self.change, self.seed, guided=True) if self.change.straight else None

    def extra_repr(self) -> str:
        """The settings."""
        return repr(self.change)


class Defended(Recogniser):
    """A recogniser, or a classifier of sounds, that hears t(x) in place of x; it answers as it did.

    Arguments:
        change: t.
        model: Waveforms (N, T) to outputs: a recogniser, or a module that gives logits (N, K).
        seed: Of what is drawn, anew for each sound and call.
    """

    def __init__(self, change: Sound, model: Callable[[Tensor], Any], seed: int = 0) -> None:
        super().__init__()
        self.rate = getattr(model, "rate", Recogniser.rate)
        self.ear, self.model = Ear(at(change, self.rate), seed), model
        for known in ("access", "name", "seconds"):
            setattr(self, known, getattr(model, known, getattr(Recogniser, known)))

    def forward(self, x: Tensor) -> Any:
        """The model's answer for t(x)."""
        return self.model(self.ear(x))

    def text(self, outputs: Tensor) -> list[str]:
        """The recogniser's."""
        return self._recogniser.text(outputs)

    def loss(self, outputs: Tensor, texts: Sequence[str]) -> Tensor:
        """The recogniser's."""
        return self._recogniser.loss(outputs, texts)

    def says(self, outputs: Tensor, texts: Sequence[str]) -> Tensor:
        """The recogniser's."""
        return self._recogniser.says(outputs, texts)

    def check_text(self, text: str) -> None:
        """The recogniser's."""
        self._recogniser.check_text(text)

    def adaptive(self, attack: Attack) -> Attack:
        """The attack that knows of the defense."""
        return adaptive(self, attack)

    @property
    def _recogniser(self) -> Recogniser:
        assert isinstance(self.model, Recogniser)
        return self.model
