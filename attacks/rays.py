"""RayS: the shortest ray in l_inf, among the corners of the cube, from labels.

Symbols: d in {-1, 1}^D is a direction, r the least radius known at which x + r * d, clipped to the range, meets the goal; k
numbers the blocks of entries: block 1 is all of them, 2 and 3 are its halves, 4 to 7 the quarters, and so on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.starts import Meter
from advkit.streams import Streams
from advkit.threat import Lp

FAR = 1024.0
"""The first radius where the range is not finite, in units of the greatest entry of x."""


@dataclass(frozen=True)
class RayS:
    r"""d with the signs of block k turned is kept if it meets the goal at a radius less than r, which is then searched for.

    The blocks are tried in order, from the whole input down to single entries; after the last the single entries come again.
    No start is needed: as long as no direction meets the goal, r is so large that the whole range is in reach. Here this
    differs from the paper: a direction must gain a share ``tol`` of r, and the search for its radius begins next to r, as most
    gains are small, with steps that double.

    Chen and Gu, 2020, "RayS: a ray searching method for hard-label adversarial attack", https://arxiv.org/abs/2006.12792.

    Arguments:
        queries: How many forward passes are made.
        tol: How well a radius is searched, as a share of it.
    """

    queries: int = 5000
    tol: float = 0.003
    access = Access.LABELS
    norms = (math.inf,)
    minimum = True
    paper = "Chen and Gu 2020"

    def __post_init__(self) -> None:
        check_whole("rays: queries", self.queries, 1)
        check_positive("rays: tol", self.tol)

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The closest input found on a ray, with shape (N, *)."""
        meter, size = Meter(oracle, x, self.queries), x[0].numel()
        d, x_t = torch.ones_like(x), x.clone()
        r = _first(x, threat)
        high, low, step = r.clone(), torch.zeros_like(r), r / 2
        k = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        searching = torch.zeros_like(k, dtype=torch.bool)
        # One query a row and turn: a row either tries a block, or searches the radius of the one that it tried.
        while len(rows := meter.live):
            turned = torch.where(_block(k[rows], size).view_as(x[rows]), -d[rows], d[rows])
            on, top, floor = searching[rows], high[rows], low[rows]
            within = torch.where(floor > 0, (floor + top) / 2, torch.maximum(top - step[rows], top / 2))
            radius = torch.where(on, within, top)
            tried = (x[rows] + per_row(radius, x) * turned).clamp(threat.low, threat.high)
            met = meter.fooled(tried, rows)
            x_t[rows[met]] = tried[met]
            high[rows] = torch.where(met, radius, top)
            low[rows] = torch.where(on & ~met, radius, floor)
            step[rows] *= torch.where(on & met, 2.0, 1.0)
            ended = torch.where(on, high[rows] - low[rows] <= self.tol * high[rows], ~met)
            searching[rows] = ~ended
            kept = rows[on & ended]
            d[kept], r[kept] = turned[on & ended], high[kept]
            ready = rows[ended]
            high[ready], low[ready], step[ready] = (1 - self.tol) * r[ready], 0.0, 2 * self.tol * r[ready]
            k[ready] = _next(k[ready], size)
        return x_t


def _first(x: Tensor, threat: Lp) -> Tensor:
    """A radius that reaches the whole range, with shape (N,)."""
    size = lp_norm(x, math.inf)
    width = threat.high - threat.low
    return torch.full_like(size, width) if width < math.inf else FAR * torch.where(size > 0, size, torch.ones_like(size))


def _level(k: Tensor) -> Tensor:
    """The greatest power of 2 that is not more than k: how many blocks there are, (M,) int64."""
    return torch.bitwise_left_shift(torch.ones_like(k), k.clamp(min=1).double().log2().floor().long())


def _block(k: Tensor, size: int) -> Tensor:
    """Which of ``size`` entries are in block k, (M, size) bool; block 0 is empty."""
    parts = _level(k)
    length = (size + parts - 1) // parts
    first = torch.where(k > 0, (k - parts) * length, size).unsqueeze(1)
    i = torch.arange(size, device=k.device)
    return (i >= first) & (i < first + length.unsqueeze(1))


def _next(k: Tensor, size: int) -> Tensor:
    """The block after k, (M,): those that are empty are passed over, and after single entries come single entries."""
    after = k + 1
    parts = _level(k)
    length = (size + parts - 1) // parts
    empty = (k > 0) & ((after - parts) * length >= size)
    after = torch.where(empty, 2 * parts, after)
    return torch.where((length == 1) & (_level(after) > parts), parts, after)
