"""Variance tuning: gradients corrected by how those around the last iterate differed.

Symbols: g is the gradient of the loss at x_t, v the correction, n the number of neighbours, beta the radius they are drawn from
in multiples of eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.combine import Lens, Wrapper
from advkit.engine import Attack
from advkit.losses import Loss
from advkit.oracle import Oracle, Through
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.surrogates import check_gradients
from advkit.threat import Lp


class _Tuned(Lens):
    """The oracle, with v of the last call added to each row's gradient."""

    def __init__(self, oracle: Oracle, n: int, zone: Lp, x: Tensor, rng: Streams) -> None:
        super().__init__(oracle)
        self.n, self.zone, self.rng = n, zone, rng
        self.v = torch.zeros_like(x)

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and g + v."""
        values, g = self.oracle.grad(x_adv, loss, rows, towards=towards, through=through)
        who = slice(None) if rows is None else rows
        around = torch.zeros_like(g)
        for _ in range(self.n):
            # For every row, so that all streams stay in step.
            neighbour = x_adv + self.zone.start(torch.zeros_like(self.v), self.rng)[who]
            around += self.oracle.grad(neighbour, loss, rows, towards=towards, through=through)[1]
        tuned = g + self.v[who]
        self.v[who] = around / self.n - g
        return values, tuned


@dataclass(frozen=True)
class VMI(Wrapper):
    r"""The attack with g + v in place of g, v = the mean gradient at n neighbours of the iterate before, less that at it.

    Wang and He, 2021, "Enhancing the transferability of adversarial attacks through variance tuning",
    https://arxiv.org/abs/2103.15571; ``vmi(mi-fgsm)`` and ``vmi(ni-fgsm)`` are the paper's. Neighbours are uniform in the
    ball of radius beta * eps around the iterate, in the norm of the threat model.

    Arguments:
        attack: An attack with gradients.
        n: How many neighbours.
        beta: The radius that they are drawn from, in multiples of eps.
    """

    attack: Attack
    n: int = 5
    beta: float = 1.5
    minimum = False
    paper = "Wang and He 2021"

    def __post_init__(self) -> None:
        check_gradients("vmi", self.attack)
        check_whole("vmi: n", self.n, 1)
        check_positive("vmi: beta", self.beta)

    @property
    def norms(self) -> tuple[float, ...]:
        """The attack's, but for l_0, where there are no near neighbours."""
        return tuple(p for p in self.attack.norms if p != 0)

    @property
    def cost(self) -> int:
        """At most 1 + n times the attack's."""
        return (1 + self.n) * self.attack.cost

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The attack's last iterate, with shape (N, *)."""
        zone = Lp(threat.p, self.beta * threat.eps, -math.inf, math.inf)
        return self.attack(_Tuned(oracle, self.n, zone, x, rng), x, threat, rng)
