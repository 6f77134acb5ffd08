"""Search in shells around the input: closer and closer rings of random candidates.

Symbols: r is the outer and l the inner radius of the shell that is searched, Delta_r the width of the thinnest, N the number of
candidates in a shell, B how often the thinnest shell may hold nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_share, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

REACH = 10.0
"""The first r where there is neither a radius nor a range, as the authors have it for codes."""


@dataclass(frozen=True)
class Natural:
    r"""N random candidates with norms in (l, r]: first in halves of what is left, then in shells of width Delta_r.

    The hybrid shrinking search (Algorithm 2). At first l = 0. A shell that holds a success is followed by (d / 2, d], where d
    is the norm of the closest, one that holds none by its outer half, until r - l < Delta_r. Then the shell within Delta_r of
    the closest success is searched, again after each success, until it has held none B times. A row without any success
    begins again, where the paper gives it up.

    Made for codes of a generator (the threat model ``latent``), it serves any ball.

    Zhao, Dua and Singh, 2018, "Generating natural adversarial examples", https://arxiv.org/abs/1710.11342.

    Arguments:
        queries: How many forward passes are made.
        samples: N.
        step: Delta_r, as a share of the first r, less than 1.
        patience: B.
        reach: The first r; by default the radius. Where there is none, the norm of a change of every entry by the whole range,
            and 10 where the range is not finite, as that of codes.
    """

    queries: int = 5000
    samples: int = 100
    step: float = 0.001
    patience: int = 5
    reach: float | None = None
    access = Access.LABELS
    norms = (2.0, math.inf)
    minimum = True
    paper = "Zhao et al. 2018"

    def __post_init__(self) -> None:
        check_whole("natural: queries", self.queries, 1)
        check_whole("natural: samples", self.samples, 1)
        check_share("natural: step", self.step)
        check_whole("natural: patience", self.patience, 1)
        check_positive("natural: reach", self.reach)

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The closest success, x where there is none, with shape (N, *)."""
        shells = Shells.around(x, self._reach(threat, x), self.step, self.patience)
        x_t = x.clone()
        for k in range(self.queries):
            rows = oracle.live
            rows = rows[shells.open[rows]]
            if not len(rows):
                break
            u = rng.normal(*x.shape[1:], rows=rows, dtype=x.dtype)
            d = shells.draw(rng.uniform(rows=rows, dtype=x.dtype), rows)
            z = threat.project(x[rows] + per_row(d / lp_norm(u, threat.p), u) * u, x[rows])
            met = oracle.fooled(z, rows)
            closer = shells.note(threat.distance(z[met], x[rows[met]]), rows[met])
            x_t[rows[met][closer]] = z[met][closer]
            if (k + 1) % self.samples == 0:
                shells.shrink()
        return x_t

    def _reach(self, threat: Lp, x: Tensor) -> float:
        if self.reach is not None:
            return self.reach
        if threat.eps < math.inf:
            return threat.eps
        if threat.high - threat.low == math.inf:
            return REACH
        return threat.width * (1.0 if threat.p == math.inf else math.sqrt(x[0].numel()))


@dataclass
class Shells:
    """The shell that each row searches; all but the numbers have shape (N,).

    Attributes:
        first: The first r.
        step: Delta_r.
        patience: B.
        l: The inner radius.
        r: The outer radius.
        near: The norm of the closest success in this shell, inf where there is none.
        best: The norm of the closest of all.
        thin: Which rows search shells of width Delta_r.
        misses: How often such a shell has held nothing, since the last success.
        open: Which rows go on.
    """

    first: float
    step: float
    patience: int
    l: Tensor
    r: Tensor
    near: Tensor
    best: Tensor
    thin: Tensor
    misses: Tensor
    open: Tensor

    @classmethod
    def around(cls, x: Tensor, first: float, share: float, patience: int) -> Shells:
        """The whole balls of radius ``first``, one for each row of x."""
        nothing = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        count = torch.zeros_like(nothing, dtype=torch.int64)
        l, r = torch.zeros_like(nothing), torch.full_like(nothing, first)
        thin = count.bool()
        return cls(first, share * first, patience, l, r, nothing, nothing.clone(), thin, count, ~thin)

    def draw(self, share: Tensor, rows: Tensor) -> Tensor:
        """Norms in (l, r], with shape (M,), of uniform draws in [0, 1)."""
        return self.r[rows] - share * (self.r - self.l)[rows]

    def note(self, distance: Tensor, rows: Tensor) -> Tensor:
        """Remember successes of some rows, (M,); which of them are the closest so far, (M,)."""
        closer = distance < self.best[rows]
        self.near[rows] = torch.minimum(self.near[rows], distance)
        self.best[rows] = torch.minimum(self.best[rows], distance)
        return closer

    def shrink(self) -> None:
        """Go on to the next shell of each row."""
        hit, was_thin = self.near < math.inf, self.thin
        inner = torch.where(hit, self.near / 2, (self.l + self.r) / 2)
        outer = torch.where(hit, self.near, self.r)
        self.misses = torch.where(was_thin & ~hit, self.misses + 1, 0)
        self.open = self.open & (self.misses < self.patience)
        found = self.best < math.inf
        ends = ~was_thin & (outer - inner < self.step)
        again = ends & ~found
        self.thin = was_thin | ends & found
        self.r = torch.where(self.thin & found, self.best, torch.where(again, self.first, outer))
        thinnest = (self.r - self.step).clamp(min=0)
        self.l = torch.where(self.thin, thinnest, torch.where(again, 0.0, inner))
        self.near = torch.full_like(self.near, math.inf)
