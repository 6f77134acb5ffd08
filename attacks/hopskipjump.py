"""HopSkipJump: the gradient at the boundary, from labels.

Symbols: x_t is the iterate, on the boundary; d its distance from x; u_b are B random directions, delta the distance of the
probes x_t + delta * u_b, phi_b = 1 where a probe meets the goal and -1 where it does not; v is the estimate of the gradient, xi
the step along it. M is the number of rows at work, * the shape of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.errors import UsageError
from advkit.norms import lp_norm, per_row, steepest
from advkit.oracle import Access, Oracle
from advkit.spec import check_at_least, check_whole
from advkit.starts import Meter, begin, bisect
from advkit.streams import Streams
from advkit.threat import Lp

ENTRIES = 200_704
"""How many numbers the probes of one call hold, unless the batch itself holds more: 256 digits of 28 x 28."""
REACH = 0.1
"""delta as a share of d."""
SHRINKS = 10
"""How often xi is halved, at most, until the step meets the goal."""


@dataclass(frozen=True)
class HopSkipJump:
    r"""Steps along an estimate of the gradient, each followed by a search for the boundary on the way back to x.

    v = sum over b of (phi_b - mean(phi)) * u_b, with B = probes * sqrt(t); x_t + xi * v (in l_inf, of its sign) with
    xi = d / sqrt(t), halved until it meets the goal.

    Here this differs from the paper in three ways, which bring closer examples for the same queries: v keeps a share of the
    estimate before; delta is a tenth of d rather than d / D, and the boundary is found just as well as such probes need; there
    are fewer probes a step.

    Chen, Jordan and Wainwright, 2020, "HopSkipJumpAttack: a query-efficient decision-based attack",
    https://arxiv.org/abs/1904.02144.

    Arguments:
        queries: How many forward passes are made.
        probes: B of the first step.
        memory: The share of the last estimate that is kept.
    """

    queries: int = 5000
    probes: int = 50
    memory: float = 0.5
    access = Access.LABELS
    norms = (2.0, math.inf)
    minimum = True
    paper = "Chen et al. 2020"

    def __post_init__(self) -> None:
        check_whole("hopskipjump: queries", self.queries, 1)
        check_whole("hopskipjump: probes", self.probes, 2)
        check_at_least("hopskipjump: memory", self.memory, 0)
        if self.memory > 1:
            raise UsageError(f"hopskipjump: memory is {self.memory}; it should be at most 1")

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        p, meter = threat.p, Meter(oracle, x, self.queries)
        halvings = max(8, round(math.log2(math.sqrt(x[0].numel()) / REACH)))
        x_t = begin(meter, x, threat, rng, halvings)
        v = torch.zeros_like(x)
        t = 1
        while len(rows := meter.live):
            d = lp_norm(x_t[rows] - x[rows], p)
            B = int(self.probes * math.sqrt(t))
            # What the way back will need is kept.
            n = (meter.left[rows] - halvings - 2).clamp(1, B)
            v[rows] = self.memory * v[rows] + _estimate(meter, x_t, REACH * d, n, B, rows, threat, rng)
            z, met = _step(meter, x_t[rows], steepest(v[rows], p), d / math.sqrt(t), rows, threat)
            moved = rows[met]
            x_t[moved] = bisect(meter, x[moved], z[met], moved, p, halvings)
            t += 1
        return x_t


def _estimate(meter: Meter, x_t: Tensor, delta: Tensor, n: Tensor, B: int, rows: Tensor, threat: Lp, rng: Streams) -> Tensor:
    """The unit direction in which ``rows`` gain, (M, *), from the first n, (M,), of B probes at distance delta, (M,).

    The probes are drawn and sent in pieces, so that memory is bounded; which ones a row draws does not depend on the pieces.
    """
    size = x_t[0].numel()
    at_once = max(1, min(B, ENTRIES // size))
    together = max(1, max(ENTRIES, x_t.numel()) // (size * at_once))
    weighted, plain = torch.zeros_like(x_t[rows]), torch.zeros_like(x_t[rows])
    total = torch.zeros_like(delta)
    for first in range(0, B, at_once):
        b, drawn = min(at_once, B - first), rng.drawn
        for part in torch.arange(len(rows), device=rows.device).split(together):
            rng.drawn = drawn
            here, far = x_t[rows[part]].unsqueeze(1), delta[part].view(-1, *(1,) * x_t.ndim)
            z = (here + far * _directions(b, x_t, rows[part], threat.p, rng)).clamp_(threat.low, threat.high)
            asked = (n[part] - first).clamp(0, b)
            phi = 2.0 * meter.fooled_each(z, rows[part], asked).to(x_t.dtype) - 1.0
            used = (torch.arange(b, device=rows.device) < asked.unsqueeze(1)).to(x_t.dtype)
            # Clipping changed some directions.
            u = (z - here) / far.clamp(min=torch.finfo(x_t.dtype).tiny)
            weighted[part] += torch.einsum("mb,mb...->m...", phi * used, u)
            plain[part] += torch.einsum("mb,mb...->m...", used, u)
            total[part] += (phi * used).sum(1)
    mean = total / n
    # Where all answers are the same, less their mean nothing is left.
    share = torch.where(mean.abs() == 1, 0.0, mean)
    return steepest(weighted - per_row(share, x_t) * plain, 2)


def _directions(b: int, x: Tensor, rows: Tensor, p: float, rng: Streams) -> Tensor:
    """B random directions for each row, (M, b, *): on the unit sphere, or in l_inf uniform in the cube."""
    shape = (b, *x.shape[1:])
    if p == math.inf:
        return 2.0 * rng.uniform(*shape, rows=rows, dtype=x.dtype) - 1.0
    u = rng.normal(*shape, rows=rows, dtype=x.dtype)
    return steepest(u.flatten(0, 1), 2).view_as(u)


def _step(meter: Meter, x_t: Tensor, v: Tensor, xi: Tensor, rows: Tensor, threat: Lp) -> tuple[Tensor, Tensor]:
    """x_t + xi * v with xi halved until it meets the goal, (M, *), and where it does, (M,)."""
    z, met = x_t.clone(), torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for i in range(SHRINKS):
        open_ = (~met & (meter.left[rows] > 0)).nonzero().squeeze(1)
        if not len(open_):
            break
        tried = (x_t[open_] + per_row(xi[open_] / 2**i, x_t) * v[open_]).clamp(threat.low, threat.high)
        good = meter.fooled(tried, rows[open_])
        z[open_[good]], met[open_[good]] = tried[good], True
    return z, met
