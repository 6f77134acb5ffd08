"""Attacks on recognisers whose context is longer than the sound: first on a short context, then on the whole one.

Whisper's encoder works on 30 seconds, whatever it is given, and a gradient costs accordingly. With a context as long as the
sound a gradient costs a few times less, and what is found is nearly a success on the whole context: the rest is repaired there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from advkit.audio.recogniser import Recogniser
from advkit.audio.whisper import Whisper
from advkit.engine import Attack, AttackResult, run
from advkit.oracle import Access, Goal
from advkit.sound.threats import lengths
from advkit.sound.wav import quantised
from advkit.streams import Streams
from advkit.threat import Change, Lp


class Filed(nn.Module):
    """A recogniser that hears every sound as a file of 16 bits holds it, so that no success is lost by rounding.

    Arguments:
        recogniser: The recogniser. Gradients pass the rounding as they are.
    """

    def __init__(self, recogniser: Recogniser) -> None:
        super().__init__()
        self.recogniser = recogniser

    def forward(self, x: Tensor) -> Tensor:
        """The recogniser's outputs for waveforms (N, T)."""
        outputs: Tensor = self.recogniser(x + (quantised(x) - x).detach())
        return outputs


@runtime_checkable
class Phased(Protocol):
    """An attack that can go on from what it found on another context."""

    def after(self, found: AttackResult) -> Attack:
        """The attack that goes on from there."""


def quietest(
    attack: Attack,
    recogniser: Recogniser,
    x: Tensor,
    y: Tensor,
    threat: Lp | Change,
    *,
    goal: Goal,
    rng: torch.Generator | Streams | None = None,
    access: Access = Access.GRADIENTS,
    budget: int | None = None,
) -> AttackResult:
    """Attack a recogniser through files of 16 bits; one with a context, in two phases where the attack can.

    The first phase asks a recogniser with a context just longer than the longest sound. The second goes on from what it found,
    with the recogniser itself, whose word alone counts. Passes of both are counted.

    Arguments:
        attack: The attack.
        recogniser: The recogniser.
        x: The clean waveforms, (N, T) in [-1, 1].
        y: The numbers of the texts, (N,).
        threat: How far a sound may be changed.
        goal: What :func:`advkit.audio.recogniser.goal` made for the recogniser.
        rng: As for ``advkit.run``.
        access: The most that the attack may ask for.
        budget: The most forward passes that the attack may make for each row; with one, there is one phase.

    Raises:
        UsageError: As for ``advkit.run``.
    """
    model = Filed(recogniser)
    seconds = float(lengths(x).max()) / recogniser.rate
    if not isinstance(recogniser, Whisper) or not isinstance(attack, Phased) or seconds + 1 >= recogniser.seconds or budget:
        return run(attack, model, x, y, threat, goal=goal, rng=rng, access=access, budget=budget)
    first = run(attack, Filed(recogniser.short(seconds)), x, y, threat, goal=goal, rng=rng, access=access)
    last = run(attack.after(first), model, x, y, threat, goal=goal, rng=rng, access=access)
    counts = {name: getattr(first, name) + getattr(last, name) for name in ("forwards", "backwards", "checks")}
    return replace(last, **counts)
