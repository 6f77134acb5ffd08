"""An attack kept for the rows whose gradients mislead.

Symbols: L is the margin that a short climb along the gradient reaches, and that a short search without it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.combine import Lens, Wrapper
from advkit.engine import Attack
from advkit.losses import Loss, margin
from advkit.norms import where
from advkit.oracle import Access, Oracle, Stop, Through
from advkit.streams import Streams
from advkit.threat import Lp


class _Only(Lens):
    """The oracle, with some of its rows; the others are answered as if they were done."""

    def __init__(self, oracle: Oracle, some: Tensor) -> None:
        super().__init__(oracle)
        self.some = some

    @property
    def live(self) -> Tensor:
        """The numbers of the rows still in play, with shape (L,)."""
        rows = self.oracle.live
        rows = rows[self.some[rows]]
        if not len(rows):
            raise Stop
        return rows

    def loss(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> Tensor:
        """The oracle's for these rows, -inf for the others."""
        if rows is not None:
            return self.oracle.loss(x_adv, loss, rows, towards=towards, through=through)
        rows = self.live
        part = None if towards is None else towards[rows]
        values = torch.full((len(x_adv),), -math.inf, dtype=x_adv.dtype, device=x_adv.device)
        return values.index_copy(0, rows, self.oracle.loss(x_adv[rows], loss, rows, towards=part, through=through))


@dataclass(frozen=True)
class IfMasked(Wrapper):
    """The attack, on the rows where a search with scores reaches a greater margin than a climb along the gradient.

    That random search beats gradients is a sign that they are masked, one of those of Athalye, Carlini and Wagner, 2018,
    "Obfuscated gradients give a false sense of security", https://arxiv.org/abs/1802.00420. On a row whose gradient leads
    somewhere the attack would be wasted, and it is not run.

    Arguments:
        attack: What such a row deserves; one that asks for losses row by row, as ``square``.
        climb: A short attack with gradients.
        search: A short attack with scores.
    """

    attack: Attack
    climb: Attack
    search: Attack
    paper = "Athalye et al. 2018"

    @property
    def access(self) -> Access:
        """The most that any of them needs."""
        return max(self.attack.access, self.climb.access, self.search.access)

    @property
    def norms(self) -> tuple[float, ...]:
        """Those that all of them serve."""
        return tuple(p for p in self.attack.norms if p in self.climb.norms and p in self.search.norms)

    @property
    def cost(self) -> int:
        """All three, and a look at the end of the two short ones."""
        return self.attack.cost + self.climb.cost + self.search.cost + 2

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The attack's last iterate, with shape (N, *)."""
        climbed = oracle.loss(self.climb(oracle, x, threat, rng), margin)
        x_adv = self.search(oracle, x, threat, rng)
        some = oracle.loss(x_adv, margin) > climbed
        # A stream of its own, which is drawn from as far whether the attack runs or not.
        own = Streams(rng.words(()))
        # Its rows may be done before the others are.
        with contextlib.suppress(Stop):
            last = self.attack(_Only(oracle, some), x, threat, own)
            x_adv = where(some, last, x_adv)
        return x_adv
