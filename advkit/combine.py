"""Attacks made of attacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from advkit.engine import Attack
from advkit.errors import UsageError
from advkit.losses import Loss
from advkit.oracle import Access, Oracle, Through
from advkit.spec import check_whole
from advkit.streams import Streams
from advkit.threat import Lp


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

    def fooled(self, x_adv: Tensor, rows: Tensor | None = None) -> Tensor:
        """The oracle's."""
        return self.oracle.fooled(x_adv, rows)

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
