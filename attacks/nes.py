"""NES: projected ascent on gradients that scores alone give.

Symbols: x_t is the iterate, L the margin, u a normal direction, n how many pairs x_t + sigma * u and x_t - sigma * u are asked
about, g the estimate of the gradient, v its running sum, mu the momentum, alpha the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.differences import difference, shares
from advkit.losses import margin
from advkit.oracle import Access, Oracle
from advkit.spec import check_at_least, check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp


@dataclass(frozen=True)
class NES:
    r"""x_{t+1} = project(x_t + alpha * steepest(v)), v = mu * v + g.

    g is the mean over the pairs of (L(x_t + sigma * u) - L(x_t - sigma * u)) / (2 * sigma) * u. A step is alpha * sign(v) in
    l_inf and of length alpha in l_2. The paper takes many pairs close to x_t; with a momentum of 0.9 a few pairs, further
    away, find more at the same number of queries. What is asked about is projected first, so that it can succeed.

    Ilyas, Engstrom, Athalye and Lin, 2018, "Black-box adversarial attacks with limited queries and information",
    https://arxiv.org/abs/1804.08598.

    Arguments:
        queries: How many forward passes are made; an odd one is left.
        pairs: n, how many are taken a step.
        sigma: sigma, in the units of the data; by default 0.2 * eps in l_inf, and in l_2 what makes sigma * u about as long as
            0.3 * eps.
        step: alpha, in the units of the data; by default 0.3 * eps.
        momentum: mu; 0 for the estimate alone.
    """

    queries: int = 5000
    pairs: int = 5
    sigma: float | None = None
    step: float | None = None
    momentum: float = 0.9
    access = Access.SCORES
    norms = (math.inf, 2.0)
    minimum = False
    paper = "Ilyas et al. 2018"

    def __post_init__(self) -> None:
        check_whole("nes: queries", self.queries, 2)
        check_whole("nes: pairs", self.pairs, 1)
        check_positive("nes: sigma", self.sigma)
        check_positive("nes: step", self.step)
        check_at_least("nes: momentum", self.momentum, 0)

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        sigma, alpha = self._sigma(x, threat), 0.3 * threat.eps if self.step is None else self.step
        x_t, v = x.clone(), torch.zeros_like(x)

        def draw(rows: Tensor) -> Tensor:
            return rng.normal(*x.shape[1:], rows=rows, dtype=x.dtype)

        for n in shares(self.queries // 2, self.pairs):
            rows = oracle.live
            g = difference(oracle, margin, x_t, x, threat, rows, n, sigma, draw)
            v[rows] = self.momentum * v[rows] + g
            x_t[rows] = threat.project(x_t[rows] + alpha * threat.steepest(v[rows]), x[rows])
        return x_t

    def _sigma(self, x: Tensor, threat: Lp) -> float:
        if self.sigma is not None:
            return self.sigma
        return 0.2 * threat.eps if threat.p == math.inf else 0.3 * threat.eps / math.sqrt(x[0].numel())
