"""The Boundary attack: a random walk along the boundary, towards x.

Symbols: x_t is the iterate, which meets the goal; d its distance from x; eta a random step of relative length delta on the
sphere of radius d around x; epsilon the relative length of the step towards x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_whole
from advkit.starts import Meter, begin
from advkit.streams import Streams
from advkit.threat import Lp

HALVINGS = 10
"""How often the way from x to the first input is halved."""
GROWTH, ODDS = 1.1, 5
"""The factor of delta after a step that was kept; ODDS steps that were not undo it."""
FIRST, MOST = 0.3, 0.5
"""The first and the greatest delta."""


@dataclass(frozen=True)
class Boundary:
    r"""x + (1 - epsilon) * (s - x), where s is x_t moved by eta on the sphere, is kept if it meets the goal.

    The paper tunes delta until half of the points s meet the goal, which takes queries of their own, and epsilon by how often
    the steps towards x do. Here epsilon is delta^2 / 2, the order of what a step on the sphere can gain, so that delta alone is
    tuned, after every query: it grows where the step was kept and shrinks where it was not, until one step in six is kept.

    Brendel, Rauber and Bethge, 2018, "Decision-based adversarial attacks: reliable attacks against black-box machine learning
    models", https://arxiv.org/abs/1712.04248.

    Arguments:
        queries: How many forward passes are made.
    """

    queries: int = 5000
    access = Access.LABELS
    norms = (2.0,)
    minimum = True
    paper = "Brendel et al. 2018"

    def __post_init__(self) -> None:
        check_whole("boundary: queries", self.queries, 1)

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        meter = Meter(oracle, x, self.queries)
        x_t = begin(meter, x, threat, rng, HALVINGS)
        delta = torch.full((len(x),), FIRST, dtype=x.dtype, device=x.device)
        while len(rows := meter.live):
            r, step = x_t[rows] - x[rows], delta[rows]
            # In many dimensions a direction as random as a Gaussian one, in less time.
            eta = _across(rng.uniform(*x.shape[1:], rows=rows, dtype=x.dtype) - 0.5, r)
            s = per_row(1 / (1 + step.square()).sqrt(), x) * (r + per_row(step, x) * eta)
            epsilon = step.square() / 2
            tried = (x[rows] + per_row(1 - epsilon, x) * s).clamp(threat.low, threat.high)
            kept = meter.fooled(tried, rows)
            x_t[rows[kept]] = tried[kept]
            delta[rows] = (step * torch.where(kept, GROWTH, GROWTH ** (-1 / ODDS))).clamp(max=MOST)
        return x_t


def _across(eta: Tensor, r: Tensor) -> Tensor:
    """``eta`` less its part along ``r``, as long as r, (M, *)."""
    tiny = torch.finfo(r.dtype).tiny
    d = lp_norm(r, 2)
    eta = eta - per_row((eta * r).flatten(1).sum(1) / d.square().clamp(min=tiny), r) * r
    return per_row(d / lp_norm(eta, 2).clamp(min=tiny), r) * eta
