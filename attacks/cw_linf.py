"""The attack of Carlini and Wagner in l_inf.

Symbols: L is the margin (positive where the model is fooled), g its gradient, x_t the iterate, delta = x_t - x, tau the size
beyond which an entry of delta is pulled back, c the weight of the margin, m and s the moments of Adam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

BETA_1, BETA_2 = 0.9, 0.999
"""How fast Adam's moments forget."""
FIRST, SHRINK = 1.5, 0.95
"""The first tau, as a multiple of the distance of the linear margin; and what becomes of tau after a success."""
SETTLED = 1.001
"""How far beyond tau a success that ends a round may be."""


@dataclass(frozen=True)
class CWLinf:
    r"""Adam on sum_i max(|delta_i| - tau, 0) + c * max(-L, 0), in rounds from one iterate to the next.

    A round ends with a success inside tau, or after ``patience`` steps. If there was a success, tau falls to 0.95 (the paper:
    0.9) of its size and c halves; if not, c doubles. Each row has rounds of its own.

    What the paper leaves to settings follows from the margin's linear model here: tau starts (1 in the paper) at 1.5 times
    |L| / ||g||_1, and c (1e-5) at 1 / max |g|, where one step of the margin just holds the pull of an entry. Adam's step is in
    units of tau, so that it refines what it has found; a round that fails raises tau as well, to the geometric mean of tau and
    the best size so far, or to twice tau; and the range is kept by clipping in place of a tanh.

    Carlini and Wagner, 2017, "Towards evaluating the robustness of neural networks", https://arxiv.org/abs/1608.04644.

    Arguments:
        steps: How many gradients are taken.
        patience: How many steps a round takes at most.
        lr: Adam's step, as a share of tau.
    """

    steps: int = 500
    patience: int = 30
    lr: float = 0.05
    access = Access.GRADIENTS
    norms = (math.inf,)
    minimum = True
    paper = "Carlini and Wagner 2017"

    def __post_init__(self) -> None:
        check_whole("cw-linf: steps", self.steps, 1)
        check_whole("cw-linf: patience", self.patience, 1)
        check_positive("cw-linf: lr", self.lr)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        L, g = oracle.grad(x, margin)
        tau = (FIRST * L.abs().clamp(1e-6, 1e10) / lp_norm(g, 1).clamp(min=1e-10)).clamp(max=threat.high - threat.low)
        c = 1 / lp_norm(g, math.inf).clamp(min=1e-10)
        best, age, seen = torch.full_like(c, math.inf), torch.zeros_like(c), torch.zeros_like(c, dtype=torch.bool)
        x_t, m, s = x, torch.zeros_like(x), torch.zeros_like(x)
        for i in range(self.steps):
            if i:
                L, g = oracle.grad(x_t, margin)
            delta = x_t - x
            size, fooled = lp_norm(delta, math.inf), L > 0
            seen, best = seen | fooled, torch.where(fooled, torch.minimum(best, size), best)
            ended = fooled & (size <= SETTLED * tau) | (age >= self.patience)
            c = torch.where(ended, torch.where(seen, c / 2, 2 * c), c)
            tau = torch.where(ended, _next(tau, best, seen), tau)
            age, seen = torch.where(ended, 0.0, age) + 1, seen & ~ended
            m[ended], s[ended] = 0.0, 0.0
            pull = torch.where(delta.abs() > per_row(tau, x), delta.sign(), 0.0)
            d = pull - per_row(torch.where(L <= 0, c, 0.0), x) * g
            m, s = m.lerp(d, 1 - BETA_1), s.lerp(d * d, 1 - BETA_2)
            step = self.lr * tau * (1 - BETA_2**age).sqrt() / (1 - BETA_1**age)
            x_t = (x_t - per_row(step, x) * m / s.sqrt().clamp(min=torch.finfo(x.dtype).tiny)).clamp(threat.low, threat.high)
        return x_t


def _next(tau: Tensor, best: Tensor, seen: Tensor) -> Tensor:
    """The tau of the round after one that ended with or without a success, (N,)."""
    wider = torch.where(best < math.inf, (tau * best).sqrt(), 2 * tau)
    return torch.where(seen, SHRINK * torch.minimum(tau, best), wider)
