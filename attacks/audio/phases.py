"""Attacks on recognisers whose context is longer than the sound: first on a cheaper stand-in, then on the recogniser.

Whisper's encoder works on 30 seconds, whatever it is given, and a gradient costs accordingly. Where most of that is silence, it
need not be computed anew in every step (:class:`advkit.audio.whisper.Nearly`): a gradient costs a few times less, what is found
is nearly a success, and the rest is repaired on the recogniser itself.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from advkit.audio.recogniser import Recogniser
from advkit.audio.whisper import Nearly, Whisper
from advkit.engine import Attack, AttackResult, run
from advkit.oracle import Access, Goal
from advkit.sound.threats import lengths
from advkit.sound.wav import quantised
from advkit.streams import Streams
from advkit.threat import Change, Lp


class Filed(nn.Module):
    """A recogniser that hears every sound as a file of 16 bits holds it, so that no success is lost by rounding.

    Arguments:
        recogniser: The recogniser, or a stand-in. Gradients pass the rounding as they are.
    """

    def __init__(self, recogniser: nn.Module) -> None:
        super().__init__()
        self.recogniser = recogniser
        # What views of a sound go by.
        self.rate = getattr(recogniser, "rate", Recogniser.rate)

    def forward(self, x: Tensor) -> Tensor:
        """The recogniser's outputs for waveforms (N, T)."""
        outputs: Tensor = self.recogniser(x + (quantised(x) - x).detach())
        return outputs


@runtime_checkable
class Phased(Protocol):
    """An attack that can go on from what it found on a stand-in."""

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

    The first phase asks a recogniser that looks at the silence after a sound only now and then, one row after the other. The
    second goes on from what it found, with the recogniser itself, whose word alone counts. Passes of both are counted.

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
    found = []
    for k in range(len(x)):
        row = slice(k, k + 1)
        nearly = Filed(Nearly(recogniser, float(lengths(x[row])) / recogniser.rate))
        draws = _part(rng, row)
        first = run(attack, nearly, x[row], y[row], threat, goal=goal, rng=draws, access=access)
        last = run(attack.after(first), model, x[row], y[row], threat, goal=goal, rng=draws, access=access)
        counts = {name: getattr(first, name) + getattr(last, name) for name in ("forwards", "backwards", "checks")}
        found.append(replace(last, **counts))
    return _together(found)


def _part(rng: torch.Generator | Streams | None, row: slice) -> torch.Generator | Streams | None:
    return Streams(rng.keys[row]) if isinstance(rng, Streams) else rng


def _together(results: list[AttackResult]) -> AttackResult:
    """The results of one row each as one."""
    parts: dict[str, Any] = {}
    for one in fields(AttackResult):
        values = [getattr(result, one.name) for result in results]
        parts[one.name] = None if values[0] is None else torch.cat(values)
    return AttackResult(**parts)
