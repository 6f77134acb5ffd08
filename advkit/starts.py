"""What attacks that see only labels share: a meter of queries, a first input that meets the goal, and the way to the boundary.

Symbols: x is the clean input, z one that meets the goal, a in [0, 1] how far a point is on the way from x to z. In l_2 that
way is the segment; in l_inf the point is z inside the ball around x of radius a * ||z - x||_inf. A query is a forward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advkit.norms import lp_norm, per_row
from advkit.oracle import Oracle
from advkit.streams import Streams
from advkit.threat import Lp

TRIES = 100
"""How many inputs are tried, at most, before a row is given up."""
SIDES = (1, 4, 8, 2, 16)
STRENGTHS = (1.0, 0.5, 0.75, 0.25)
"""The cells of the noise that is tried, and how far it is blended into x."""


class Meter:
    """An oracle's labels, for rows that have queries left.

    Arguments:
        oracle: The oracle.
        x: The clean inputs, with shape (N, *).
        queries: How many candidates each row may ask about.

    Attributes:
        queries: The same.
        left: How many queries each row has left, with shape (N,).
    """

    def __init__(self, oracle: Oracle, x: Tensor, queries: int) -> None:
        self.oracle, self.queries = oracle, queries
        self.left = torch.full((len(x),), queries, dtype=torch.int64, device=x.device)

    @property
    def live(self) -> Tensor:
        """The numbers of the rows that are in play and have queries left, with shape (L,)."""
        rows = self.oracle.live
        return rows[self.left[rows] > 0]

    def fooled(self, z: Tensor, rows: Tensor) -> Tensor:
        """Which candidates meet the goal, (M,) bool; candidate j is one for row ``rows[j]``, each row has at most one.

        Where the row has no query left, the answer is False.
        """
        met = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        asked = (self.left[rows] > 0).nonzero().squeeze(1)
        if len(asked):
            self.left[rows[asked]] -= 1
            met[asked] = self.oracle.fooled(z[asked], rows[asked])
        return met

    def fooled_each(self, z: Tensor, rows: Tensor, n: Tensor) -> Tensor:
        """Which of B candidates for each row meet the goal, (M, B) bool; z is (M, B, *), and the first n[j] are asked about.

        n, with shape (M,), is not more than the row has left.
        """
        asked = torch.arange(z.shape[1], device=z.device) < n.unsqueeze(1)
        met = torch.zeros_like(asked)
        self.left[rows] -= n
        owner = rows.unsqueeze(1).expand_as(asked)[asked]
        if len(owner):
            met[asked] = self.oracle.fooled(z[asked], owner)
        return met


def way(x: Tensor, z: Tensor, a: Tensor, p: float) -> Tensor:
    """The point at a, (N,), on the way from x to z, with shape (N, *)."""
    if p != math.inf:
        return torch.lerp(x, z, per_row(a, x))
    r = per_row(a * lp_norm(z - x, p), x)
    return torch.minimum(torch.maximum(z, x - r), x + r)


def bisect(meter: Meter, x: Tensor, z: Tensor, rows: Tensor, p: float, steps: int) -> Tensor:
    """The closest input found to meet the goal on the way from x to z, (M, *), by halving ``steps`` times.

    x and z are those of ``rows``, (M, *); each z meets the goal, and the answer of a row without queries is what it had.
    """
    low = torch.zeros(len(rows), dtype=x.dtype, device=x.device)
    high = torch.ones_like(low)
    best = z.clone()
    for _ in range(steps):
        middle = (low + high) / 2
        tried = way(x, z, middle, p)
        met = meter.fooled(tried, rows)
        best[met] = tried[met]
        low, high = torch.where(met, low, middle), torch.where(met, middle, high)
    return best


def begin(meter: Meter, x: Tensor, threat: Lp, rng: Streams, steps: int) -> Tensor:
    """For each row an input that meets the goal, next to the boundary, (N, *).

    A row for which none is found stays at x and has no queries left, so that it is not live.
    """
    x_t, found = start(meter, x, threat, rng)
    meter.left[~found] = 0
    rows = found.nonzero().squeeze(1)
    x_t[rows] = bisect(meter, x[rows], x_t[rows], rows, threat.p, steps)
    return x_t


def start(meter: Meter, x: Tensor, threat: Lp, rng: Streams) -> tuple[Tensor, Tensor]:
    """The first input tried that meets the goal, x where there is none, (N, *); and where there is one, (N,) bool.

    Noise, the ends of the range, and then noise in cells of several sizes and strengths. Where the range is not finite, the
    noise grows with every try. At most half of the queries are spent on this.
    """
    z, found = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    tries, drawn, size = min(TRIES, math.ceil(meter.queries / 2)), rng.drawn, x[0].numel()
    for i in range(tries):
        rows = meter.live
        rows = rows[~found[rows]]
        if not len(rows):
            break
        # However many tries the batch needs, each has its own share of the stream.
        rng.drawn = drawn + i * size
        noise = _texture(i, x, rng, rows)
        low, high = _reach(i, x[rows], threat)
        tried = low + (high - low) * noise
        tried = torch.lerp(x[rows], tried, STRENGTHS[i // len(SIDES) % len(STRENGTHS)]).clamp(threat.low, threat.high)
        met = meter.fooled(tried, rows)
        z[rows[met]], found[rows[met]] = tried[met], True
    rng.drawn = drawn + tries * size
    return z, found


def _reach(i: int, x: Tensor, threat: Lp) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of the i-th try, with the shape of x; the range's, where it is finite."""
    size = lp_norm(x, math.inf)
    grown = per_row(torch.where(size > 0, size, torch.ones_like(size)) * 2.0 ** (i // 2), x)
    low = torch.full_like(x, threat.low) if threat.low > -math.inf else x - grown
    return low, torch.full_like(x, threat.high) if threat.high < math.inf else x + grown


def _texture(i: int, x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
    """The i-th texture in [0, 1], with shape (len(rows), *): uniform noise, the two ends, then noise of zeros and ones."""
    shape = x.shape[1:]
    if i == 0:
        return rng.uniform(*shape, rows=rows, dtype=x.dtype)
    if i <= 2:
        return torch.full((len(rows), *shape), float(i - 1), dtype=x.dtype, device=x.device)
    side = SIDES[i % len(SIDES)]
    axes = 1 if len(shape) < 3 else 2
    cells = tuple(math.ceil(n / side) for n in shape[-axes:])
    noise = (rng.uniform(*shape[:-axes], *cells, rows=rows) < 0.5).to(x.dtype)
    for axis, n in zip(range(-axes, 0), shape[-axes:], strict=True):
        noise = noise.index_select(axis, torch.arange(n, device=x.device) // side)
    return noise
