"""What a sound goes through between the loudspeaker and the recogniser, by name: ``room(seed=1)+noise(20)+mp3(32)``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.errors import UsageError
from advkit.sound.air import Sound
from advkit.streams import Streams
from advkit.transforms import SOUNDS, Chain, view

CHANNELS = SOUNDS
"""The parts that a channel may have; their setting ``rate`` is that of the sound."""


@dataclass(frozen=True)
class Channel:
    """Several transforms of sounds, one after the other.

    Arguments:
        parts: The transforms.
    """

    parts: tuple[Sound, ...]

    def __call__(self, x: Tensor, rate: int, rng: torch.Generator) -> Tensor:
        """What arrives, with the shape of ``x``.

        Arguments:
            x: Waveforms (N, T) in [-1, 1].
            rate: Samples a second.
            rng: Where random draws come from.
        """
        streams, rows = Streams.of(rng, len(x), x.device), torch.arange(len(x), device=x.device)
        return Chain(self.parts).at(rate)(x, streams, rows)

    def check(self, rate: int) -> None:
        """Refuse a channel that cannot be used, by trying it on a tenth of a second.

        Raises:
            UsageError: A part does not know the rate, or needs a package that is not installed.
        """
        self(torch.full((1, rate // 10), 0.1), rate, torch.Generator().manual_seed(0))


def channel(text: str) -> Channel:
    """The channel that a text names: one or several transforms of sounds joined by ``+``, in their order.

    Raises:
        UsageError: The text is not of this form, a name or a setting is unknown or has a wrong value, or a part is for images.

    >>> channel("band+gain(3)").parts
    (Band(low=300.0, high=3400.0, rate=16000), Gain(db=3.0))
    """
    chain = view(text)
    if not chain.sound:
        raise UsageError(f"the channel {text!r} changes images; its parts should be among {', '.join(CHANNELS)}")
    return Channel(chain.parts)
