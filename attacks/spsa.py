"""SPSA: Adam on gradients that scores alone give.

Symbols: x_t is the iterate, L the margin, v a direction of random signs, n how many pairs x_t + delta * v and x_t - delta * v
are asked about, g the estimate of the gradient, m and s its moments, alpha the step of Adam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.differences import difference, shares
from advkit.losses import margin
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

BETA_1, BETA_2 = 0.9, 0.999
"""The decay of Adam's moments."""
BITS = 32
"""How many signs a word of the stream gives."""


@dataclass(frozen=True)
class SPSA:
    r"""A step of Adam on g = mean of (L(x_t + delta v) - L(x_t - delta v)) / (2 delta) v, and a projection into the ball.

    The paper takes thousands of pairs a step, and a step and a delta of 0.01; at the same number of queries a few pairs and
    steps in proportion to the radius find more. What is asked about is projected, so that it can succeed.

    Uesato, O'Donoghue, van den Oord and Kohli, 2018, "Adversarial risk and the dangers of evaluating against weak attacks",
    https://arxiv.org/abs/1802.05666.

    Arguments:
        queries: How many forward passes are made; an odd one is left.
        pairs: n, how many are taken a step.
        delta: delta, in the units of the data; by default 0.2 * eps.
        step: alpha, in the units of the data; by default 0.2 * eps.
    """

    queries: int = 5000
    pairs: int = 3
    delta: float | None = None
    step: float | None = None
    access = Access.SCORES
    norms = (math.inf,)
    minimum = False
    paper = "Uesato et al. 2018"

    def __post_init__(self) -> None:
        check_whole("spsa: queries", self.queries, 2)
        check_whole("spsa: pairs", self.pairs, 1)
        check_positive("spsa: delta", self.delta)
        check_positive("spsa: step", self.step)

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        delta, alpha = (0.2 * threat.eps if given is None else given for given in (self.delta, self.step))
        x_t, m, s = x.clone(), torch.zeros_like(x), torch.zeros_like(x)

        def draw(rows: Tensor) -> Tensor:
            return _signs(x, rng, rows)

        for t, n in enumerate(shares(self.queries // 2, self.pairs), 1):
            rows = oracle.live
            g = difference(oracle, margin, x_t, x, threat, rows, n, delta, draw)
            m[rows] = torch.lerp(m[rows], g, 1 - BETA_1)
            s[rows] = torch.lerp(s[rows], g.square(), 1 - BETA_2)
            up = m[rows] / (1 - BETA_1**t) / ((s[rows] / (1 - BETA_2**t)).sqrt() + 1e-8)
            x_t[rows] = threat.project(x_t[rows] + alpha * up, x[rows])
        return x_t


def _signs(x: Tensor, rng: Streams, rows: Tensor) -> Tensor:
    """Entries of -1 and 1 for ``rows``, with shape (M, *)."""
    size = x[0].numel()
    words = rng.words((math.ceil(size / BITS), 1), rows)
    bits = words >> torch.arange(BITS, device=x.device) & 1
    return (2 * bits - 1).flatten(1)[:, :size].to(x.dtype).view(-1, *x.shape[1:])
