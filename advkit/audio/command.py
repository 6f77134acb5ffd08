"""What an attack that makes a sound out of a text is: hidden voice commands begin with words, not with a recording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from advkit.audio.recogniser import Recogniser
from advkit.oracle import Access


@dataclass(frozen=True)
class Made:
    """A sound that was made.

    Attributes:
        x: The waveform, (T,) float32 in [-1, 1], at the recogniser's rate.
        queries: How many sounds the recogniser was asked about.
        passes: How many forward and backward passes of a model's copy the attack made.
    """

    x: Tensor
    queries: int
    passes: int = 0


class CommandAttack(Protocol):
    """Frozen data whose fields are its settings; it makes a sound that a recogniser hears as a text.

    The class says ``access``, the least it needs, ``paper``, its source, and ``needs_voice``, whether it begins with the
    command as somebody says it.
    """

    @property
    def access(self) -> Access: ...  # noqa: D102
    @property
    def paper(self) -> str: ...  # noqa: D102
    @property
    def needs_voice(self) -> bool: ...  # noqa: D102

    def make(
        self,
        text: str,
        recogniser: Recogniser,
        *,
        voice: Tensor | None = None,
        listener: Recogniser | None = None,
        rng: torch.Generator,
    ) -> Made:
        """The sound.

        Arguments:
            text: What the recogniser should hear, normalised.
            recogniser: Who should hear it.
            voice: The command as somebody says it, (T,) at the recogniser's rate.
            listener: A stand-in for a person that the attack may ask; never the one that the result is judged by.
            rng: Where random draws come from.

        Raises:
            UsageError: The recogniser cannot be attacked so, or cannot say the text.
        """
