"""Attacks made of attacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advkit import transforms
from advkit.engine import Attack
from advkit.errors import UsageError
from advkit.losses import Loss
from advkit.oracle import Access, Oracle, Through
from advkit.spec import check_whole
from advkit.streams import Streams
from advkit.threat import Lp
from advkit.transforms import Chain


class Wrapper:
    """What an attack around another one has in common with it; a dataclass with a field ``attack``."""

    attack: Attack

    @property
    def access(self) -> Access:
        """The attack's."""
        return self.attack.access

    @property
    def norms(self) -> tuple[float, ...]:
        """The attack's."""
        return self.attack.norms

    @property
    def minimum(self) -> bool:
        """The attack's."""
        return self.attack.minimum


class Lens(Oracle):
    """An oracle seen through a change of its answers: a subclass overrides what changes, the rest is the oracle's own.

    What is asked, counted and kept is the oracle's as well, so a lens adds nothing to what an attack may see.
    """

    def __init__(self, oracle: Oracle) -> None:
        # Not Oracle.__init__: a lens has no books of its own.
        self.oracle = oracle

    def __getattr__(self, name: str) -> Any:
        """Whatever the lens does not have itself."""
        return getattr(self.oracle, name)

    @property
    def live(self) -> Tensor:
        """The numbers of the rows still in play, with shape (L,)."""
        return self.oracle.live

    def outputs(self, x_adv: Tensor, rows: Tensor | None = None, *, through: Through | None = None) -> Tensor:
        """The oracle's."""
        return self.oracle.outputs(x_adv, rows, through=through)

    def fooled(self, x_adv: Tensor, rows: Tensor | None = None, *, through: Through | None = None) -> Tensor:
        """The oracle's."""
        return self.oracle.fooled(x_adv, rows, through=through)

    def loss(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> Tensor:
        """The oracle's."""
        return self.oracle.loss(x_adv, loss, rows, towards=towards, through=through)

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The oracle's."""
        return self.oracle.grad(x_adv, loss, rows, towards=towards, through=through)

    def jacobian(self, x_adv: Tensor, towards: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The oracle's."""
        return self.oracle.jacobian(x_adv, towards, rows)

    def rivals(self, outputs: Tensor, n: int, rows: Tensor | None = None) -> Tensor:
        """The oracle's."""
        return self.oracle.rivals(outputs, n, rows)


@dataclass(frozen=True)
class Restarts(Wrapper):
    """The attack n times, from other random starts each time; a row that is done is not tried again.

    Arguments:
        attack: The attack; one without random draws would only repeat itself.
        n: How many times.

    Raises:
        UsageError: n is less than 1.
    """

    attack: Attack
    n: int = 10
    paper = "wrapper: the best of n runs"

    def __post_init__(self) -> None:
        check_whole("restarts: n", self.n, 1)

    @property
    def cost(self) -> int:
        """N times the attack's, and a look at the end of each run."""
        return self.n * (self.attack.cost + 1)

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last run's last iterate; the oracle keeps the best of all."""
        x_adv = self.attack(oracle, x, threat, rng)
        for _ in range(self.n - 1):
            oracle.fooled(x_adv)
            x_adv = self.attack(oracle, x, threat, rng)
        return x_adv


class _Mean(Lens):
    """The oracle, with the mean of n answers in place of one, each through another view where there are views."""

    def __init__(self, oracle: Oracle, n: int, seen: Chain | None, threat: Lp, rng: Streams) -> None:
        super().__init__(oracle)
        self.n, self.seen, self.within, self.rng = n, seen, threat, rng

    def _views(self, through: Through | None) -> list[Through | None]:
        """What the candidates go through for each of the n answers."""
        if self.seen is None:
            return [through] * self.n
        # A word of every row for each view, whichever rows are sent, so that all streams stay in step.
        return [self._view(self.seen, through, Streams(self.rng.words(()))) for _ in range(self.n)]

    def _view(self, seen: Chain, through: Through | None, rng: Streams) -> Through:
        # Images are shown in [0, 1], sounds as they are.
        low, width = (0.0, 1.0) if seen.sound else (self.within.low, self.within.width)

        def change(z: Tensor, who: Tensor) -> Tensor:
            z = z if through is None else through(z, who)
            return low + width * seen((z - low) / width, rng, who)

        return change

    def outputs(self, x_adv: Tensor, rows: Tensor | None = None, *, through: Through | None = None) -> Tensor:
        """The mean of the logits."""
        return torch.stack([self.oracle.outputs(x_adv, rows, through=view) for view in self._views(through)]).mean(0)

    def fooled(self, x_adv: Tensor, rows: Tensor | None = None, *, through: Through | None = None) -> Tensor:
        """Whether more than half of the answers for the candidates themselves meet the goal."""
        answers = [self.oracle.fooled(x_adv, rows, through=through) for _ in range(self.n)]
        return 2 * torch.stack(answers).sum(0) > self.n

    def loss(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> Tensor:
        """The mean of the losses."""
        views = self._views(through)
        return torch.stack([self.oracle.loss(x_adv, loss, rows, towards=towards, through=view) for view in views]).mean(0)

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mean of the losses, and of their gradients."""
        views = self._views(through)
        return _mean(self.oracle.grad(x_adv, loss, rows, towards=towards, through=view) for view in views)

    def jacobian(self, x_adv: Tensor, towards: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean of what is to be gained, and of its gradients.

        Raises:
            UsageError: There are views, and a jacobian is not taken through any.
        """
        if self.seen is not None:
            raise UsageError("expect: the attack takes a jacobian, which has no view; leave view out, or wrap another, as pgd")
        return _mean(self.oracle.jacobian(x_adv, towards, rows) for _ in range(self.n))


def _mean(answers: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean of values and of gradients."""
    values, g = zip(*answers, strict=True)
    return torch.stack(values).mean(0), torch.stack(g).mean(0)


@dataclass(frozen=True)
class Expect(Wrapper):
    """The attack on the mean of n answers: of losses, of gradients and of logits.

    Athalye, Engstrom, Ilyas and Kwok, 2018, "Synthesizing robust adversarial examples", https://arxiv.org/abs/1707.07397
    (expectation over transformations). Without a view this is for models that are random themselves; of label-only answers,
    more than half decide. With one, the model is shown another random view of the candidates for each answer. Success is
    still that the model is fooled by the candidate itself, of which the last iterate is shown to it.

    Arguments:
        attack: The attack.
        n: How many answers are taken in place of one.
        view: The random transforms of the inputs, by the names of ``advkit.transforms``: ``rotate(30)+jpeg(70)`` for images,
            ``room+noise(20)`` for sounds, at the rate of the model where it says one.

    Raises:
        UsageError: n is less than 1, the view cannot be read, or the attack takes labels only and there is a view.
    """

    attack: Attack
    n: int = 10
    view: str = ""
    paper = "Athalye et al. 2018"

    def __post_init__(self) -> None:
        check_whole("expect: n", self.n, 1)
        if self.view:
            transforms.view(self.view)
            if self.access == Access.LABELS:
                what = type(self.attack).__name__
                raise UsageError(f"expect: a view changes scores and gradients, and {what} takes labels; leave view out")

    @property
    def cost(self) -> int:
        """N times the attack's."""
        return self.n * self.attack.cost

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The attack's last iterate."""
        seen = transforms.view(self.view) if self.view else None
        rate = getattr(oracle._model, "rate", None)
        if seen is not None and seen.sound and rate is not None:
            seen = seen.at(rate)
        return self.attack(_Mean(oracle, self.n, seen, threat, rng), x, threat, rng)


@dataclass(frozen=True)
class Worst:
    """Several attacks, one after the other, on the rows that the ones before left standing.

    Arguments:
        attacks: The attacks, best given cheap ones first.

    Raises:
        UsageError: There are none.
    """

    attacks: tuple[Attack, ...]
    paper = "wrapper: the best of several attacks"

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", tuple(self.attacks))
        if not self.attacks:
            raise UsageError("worst needs at least one attack")

    @property
    def access(self) -> Access:
        """The most that any of them needs."""
        return max(attack.access for attack in self.attacks)

    @property
    def norms(self) -> tuple[float, ...]:
        """Those that all of them serve."""
        first, *rest = (attack.norms for attack in self.attacks)
        return tuple(p for p in first if all(p in other for other in rest))

    @property
    def minimum(self) -> bool:
        """Whether all of them search for the closest example."""
        return all(attack.minimum for attack in self.attacks)

    @property
    def cost(self) -> int:
        """The sum, and a look at the end of each."""
        return sum(attack.cost + 1 for attack in self.attacks)

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last attack's last iterate; the oracle keeps the best of all."""
        x_adv = x
        for i, attack in enumerate(self.attacks):
            if i:
                oracle.fooled(x_adv)
            x_adv = attack(oracle, x, threat, rng)
        return x_adv
