"""The attack of Carlini and Wagner in l_2.

Symbols: L is the margin (positive where the model is fooled), g its gradient, x_t the iterate, delta = x_t - x, c the weight of
the margin, D the number of entries, m and s the moments of Adam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.norms import lp_norm, per_row, where
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

BETA_1, BETA_2 = 0.9, 0.999
"""How fast Adam's moments forget."""
FACTOR = 10.0
"""By how much c grows while no success, and falls while no failure, is known."""
LATE = 0.8
"""A success counts for c in the last fifth of the steps; an earlier one may have overshot what this c would hold."""


@dataclass(frozen=True)
class CW:
    r"""Adam on ||delta||_2^2 + c * max(-L, 0), and a search for the least c.

    After each descent from x, c falls where it succeeded and grows where it failed: by a factor of 10, or to the geometric mean
    of the greatest c that failed and the least that succeeded.

    Three things differ, so that no setting depends on the data's range or the model's logits. The first c (the paper's is
    0.001) is the least that would succeed were the margin linear, 2 * |L| / ||g||_2^2. Adam's step falls linearly from lr times
    what the entries of the closest example of the linear margin are on average, |L| / ||g||_2 / sqrt(D) (the paper's is 0.01
    throughout), so a descent that does not progress is not ended early. And the range is kept by clipping, the first of
    the paper's three ways, as entries at an end of the range would hardly move through a tanh.

    Carlini and Wagner, 2017, "Towards evaluating the robustness of neural networks", https://arxiv.org/abs/1608.04644.

    Arguments:
        steps: How many gradients a descent takes.
        searches: How many values of c are tried.
        lr: Adam's first step, in the units above.
    """

    steps: int = 100
    searches: int = 9
    lr: float = 1.0
    access = Access.GRADIENTS
    norms = (2.0,)
    minimum = True
    paper = "Carlini and Wagner 2017"

    def __post_init__(self) -> None:
        check_whole("cw: steps", self.steps, 1)
        check_whole("cw: searches", self.searches, 1)
        check_positive("cw: lr", self.lr)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step, and for the first c."""
        return 2 + 2 * self.steps * self.searches

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        L, g = oracle.grad(x, margin)
        slope = lp_norm(g, 2).clamp(min=1e-10)
        far = (L.abs().clamp(1e-6, 1e10) / slope).clamp(max=(threat.high - threat.low) * math.sqrt(x[0].numel()))
        c, lr = 2 * far / slope, self.lr * far / math.sqrt(x[0].numel())
        lower, upper = torch.zeros_like(c), torch.full_like(c, math.inf)
        x_t = x
        for _ in range(self.searches):
            z, fooled = self._descent(oracle, x, c, lr, threat)
            upper, lower = torch.where(fooled, c, upper), torch.where(fooled, lower, c)
            # What is returned is where the last success was, for those who want an iterate and not the closest.
            x_t = where(fooled | (upper == math.inf), z, x_t)
            c = torch.where(lower == 0, upper / FACTOR, torch.where(upper == math.inf, lower * FACTOR, (lower * upper).sqrt()))
        return x_t

    def _descent(self, oracle: Oracle, x: Tensor, c: Tensor, lr: Tensor, threat: Lp) -> tuple[Tensor, Tensor]:
        """The last iterate, (N, *), and which rows were fooled on the way, (N,), for one c."""
        fooled = torch.zeros_like(c, dtype=torch.bool)
        x_t, m, s = x, torch.zeros_like(x), torch.zeros_like(x)
        for i in range(self.steps):
            L, g = oracle.grad(x_t, margin)
            fooled |= (L > 0) & (i >= LATE * self.steps)
            d = 2 * (x_t - x) - per_row(torch.where(L <= 0, c, 0.0), g) * g
            m, s = m.lerp(d, 1 - BETA_1), s.lerp(d * d, 1 - BETA_2)
            step = lr * (1 - i / self.steps) * math.sqrt(1 - BETA_2 ** (i + 1)) / (1 - BETA_1 ** (i + 1))
            x_t = (x_t - per_row(step, m) * m / s.sqrt().clamp(min=torch.finfo(x.dtype).tiny)).clamp(threat.low, threat.high)
        return x_t, fooled
