"""A model behind a defense that acts when it is asked, and the attack that knows of the defense.

Symbols: x is a batch of images in [0, 1], with shape (N, C, H, W); t(x) is what the model is shown in place of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from advkit.adaptive import Adaptive, Straight, straighten
from advkit.combine import Expect, Wrapper
from advkit.engine import Attack
from advkit.errors import ModelError
from advkit.oracle import Access
from advkit.streams import Streams


class Defense(Protocol):
    """What every defense of this package is: frozen data whose fields are its settings."""

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """A module that answers in the model's place, and has a method ``adaptive`` that makes an attack know of it."""


class Change(Protocol):
    """A defense that changes the input, x to t(x); frozen data.

    ``exact`` is what it does, with the gradient that it has by itself. ``guide`` is the function whose gradient an adaptive
    attack takes for it, given the same random streams; None where its own will do. ``draws`` is of how many answers an
    adaptive attack takes the mean; 1 where nothing is drawn. ``seed`` is where the draws come from.
    """

    @property
    def guide(self) -> Callable[[Tensor, Streams], Tensor] | None: ...  # noqa: D102
    @property
    def draws(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102

    def exact(self, x: Tensor, rng: Streams) -> Tensor:
        """t(x), in [0, 1]; ``rng`` has a stream for each row."""


class Dice:
    """Random streams for one batch after another. A copy draws other numbers: what imitates a model does not know its draws.

    Arguments:
        seed: What all draws come from, a whole number.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, torch.Generator().manual_seed(seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> Dice:
        return Dice(self.seed + 1)

    def throw(self, x: Tensor) -> Streams:
        """A stream for each row of ``x``, on its device; the first rows get the same ones whatever the size of the batch."""
        return Streams.of(self.rng, len(x), x.device)


class Random(nn.Module):
    """A module that draws from dice of its own.

    Arguments:
        seed: Of its dice.
        draws: Of how many answers an adaptive attack takes the mean; 1 where nothing is drawn after all.
    """

    def __init__(self, seed: int, draws: int) -> None:
        super().__init__()
        self.dice, self.draws = Dice(seed), draws

    def stand_in(self) -> nn.Module | None:
        """What an adaptive attack takes the gradient of in its place; None where its own will do."""
        return None


class Filter(Random):
    """The layer that shows t(x) in place of x.

    Arguments:
        change: t.
        guided: Whether the gradient is the guide's.
    """

    def __init__(self, change: Change, guided: bool = False) -> None:
        super().__init__(change.seed + guided, change.draws)
        self.change, self.guided = change, guided

    def forward(self, x: Tensor) -> Tensor:
        """t(x), with the shape that t gives it.

        Raises:
            ModelError: x is not a batch of images.
        """
        if x.ndim != 4:
            raise ModelError(f"the defense changes images (N, C, H, W); the inputs have shape {tuple(x.shape)}")
        keys = self.dice.throw(x).keys
        exact, guide = self.change.exact, self.change.guide
        if not self.guided or guide is None:
            return exact(x, Streams(keys))
        return Straight(lambda z: exact(z, Streams(keys)), lambda z: guide(z, Streams(keys)))(x)

    def stand_in(self) -> nn.Module | None:
        """The same with the guide's gradient."""
        return None if self.change.guide is None else Filter(self.change, guided=True)

    def extra_repr(self) -> str:
        """The settings."""
        return repr(self.change)


class Defended(nn.Module):
    """A model that is shown t(x) in place of x.

    Arguments:
        change: t.
        model: Inputs (N, *) to logits (N, K).
    """

    def __init__(self, change: Change, model: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.filter, self.model = Filter(change), model

    def forward(self, x: Tensor) -> Any:
        """The model's answer for t(x)."""
        return self.model(self.filter(x))

    def adaptive(self, attack: Attack) -> Attack:
        """The attack that knows of the defense."""
        return adaptive(self, attack)


def adaptive(model: nn.Module, attack: Attack) -> Attack:
    """An attack that knows of every defense of this package that a model has in it, one behind another or side by side.

    Gradients go around what has none of its own (BPDA; Athalye, Carlini and Wagner, 2018, https://arxiv.org/abs/1802.00420);
    where something is drawn, they are the mean over draws (EOT; Athalye, Engstrom, Ilyas and Kwok, 2018,
    https://arxiv.org/abs/1707.07397), from dice that are not the model's. What is for the attack to do already, and what it
    has no use for, is left out.

    Arguments:
        model: The defended model.
        attack: The attack, as it would be run on a model without a defense.
    """
    parts = {name: part for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, Random)}
    found = {name: part.stand_in() for name, part in parts.items()}
    hidden = {name: part for name, part in found.items() if part is not None}
    draws = max((part.draws for part in parts.values()), default=1)
    guided, averaged = (_wrapped_in(attack, kind) for kind in (Adaptive, Expect))
    if hidden and attack.access == Access.GRADIENTS and not guided:
        attack = Adaptive(attack, straighten(model, hidden))
    return Expect(attack, draws) if draws > 1 and not averaged else attack


def _wrapped_in(attack: Attack, kind: type[Wrapper]) -> bool:
    """Whether an attack, or one that it is made of, is of a kind."""
    return isinstance(attack, kind) or (isinstance(attack, Wrapper) and _wrapped_in(attack.attack, kind))


def opaque(shown: Tensor, x: Tensor) -> Tensor:
    """``shown`` by value: its gradient in x is 0, as that of a codec or a solver that is no part of a network."""
    return shown.detach() + 0.0 * x
