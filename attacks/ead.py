"""EAD: elastic net.

Symbols: L is the margin (positive where the model is fooled), g its gradient, c its weight, beta the weight of the l_1 norm,
x_k the iterate and y_k the point of Nesterov from which the step alpha is taken.
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

FACTOR = 10.0
"""By how much c grows while no success, and falls while no failure, is known."""
LATE = 0.8
"""A success counts for c in the last fifth of the steps; an earlier one may have overshot what this c would hold."""


@dataclass(frozen=True)
class EAD:
    r"""FISTA on c * max(-L, 0) + ||x_k - x||_2^2 with a threshold for the l_1 norm, and a search for the least c.

    x_{k+1} = clip(x + S(y_k - alpha * gradient - x)), S(d) = sign(d) * max(|d| - beta, 0), and
    y_{k+1} = x_{k+1} + k / (k + 3) * (x_{k+1} - x_k); alpha falls with the root of the steps left. After each search c falls
    where it succeeded and grows where it failed: by a factor of 10, or to the geometric mean of the greatest c that failed and
    the least that succeeded.

    The first c, which the paper sets to 0.001, is here twice the least that moves an entry past the threshold,
    beta / (alpha * max |g|). And successes are looked for at y_k, clipped, where the gradient is taken, so that a step takes
    one forward pass and not two.

    Chen, Sharma, Zhang, Yi and Hsieh, 2018, "EAD: elastic-net attacks to deep neural networks via adversarial examples",
    https://arxiv.org/abs/1709.04114.

    Arguments:
        steps: How many gradients a search takes.
        searches: How many values of c are tried.
        lr: The first alpha.
        beta: The threshold, as a share of the data's range (of 1 where the range is not finite).
    """

    steps: int = 100
    searches: int = 9
    lr: float = 0.01
    beta: float = 0.01
    access = Access.GRADIENTS
    norms = (1.0,)
    minimum = True
    paper = "Chen et al. 2018"

    def __post_init__(self) -> None:
        check_whole("ead: steps", self.steps, 1)
        check_whole("ead: searches", self.searches, 1)
        check_positive("ead: lr", self.lr)
        check_positive("ead: beta", self.beta)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step, and for the first c."""
        return 2 + 2 * self.steps * self.searches

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        width = threat.high - threat.low
        beta = self.beta * (width if width < math.inf else 1.0)
        _, g = oracle.grad(x, margin)
        c = 2 * beta / self.lr / lp_norm(g, math.inf).clamp(min=1e-10)
        lower, upper = torch.zeros_like(c), torch.full_like(c, math.inf)
        x_t = x
        for _ in range(self.searches):
            z, fooled = self._search(oracle, x, c, beta, threat)
            upper, lower = torch.where(fooled, c, upper), torch.where(fooled, lower, c)
            # What is returned is where the last success was, for those who want an iterate and not the closest.
            x_t = where(fooled | (upper == math.inf), z, x_t)
            c = torch.where(lower == 0, upper / FACTOR, torch.where(upper == math.inf, lower * FACTOR, (lower * upper).sqrt()))
        return x_t

    def _search(self, oracle: Oracle, x: Tensor, c: Tensor, beta: float, threat: Lp) -> tuple[Tensor, Tensor]:
        """The last iterate, (N, *), and which rows were fooled on the way, (N,), for one c."""
        fooled = torch.zeros_like(c, dtype=torch.bool)
        x_k = y_k = x
        for k in range(self.steps):
            alpha = self.lr * math.sqrt(1 - k / self.steps)
            L, g = oracle.grad(y_k, margin)
            fooled |= (L > 0) & (k >= LATE * self.steps)
            d = y_k - x
            d = d - alpha * (2 * d - per_row(torch.where(L <= 0, c, 0.0), g) * g)
            d = d.sign() * (d.abs() - beta).clamp(min=0.0)
            x_old, x_k = x_k, (x + d).clamp(threat.low, threat.high)
            y_k = (x_k + k / (k + 3) * (x_k - x_old)).clamp(threat.low, threat.high)
        return x_k, fooled
