"""The fast minimum-norm attack.

Symbols: delta is the perturbation, eps the radius it is projected to, L the margin (positive where the model is fooled), g its
gradient, q the dual of p, alpha and gamma the steps of delta and eps, both annealed from (alpha, gamma) to a small share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.norms import dual, lp_norm, per_row, project, steepest, where
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

L0_STEP = 10.0
"""In l_0 the size of an entry is free, so a row that was never fooled moves by this many steps at once."""


@dataclass(frozen=True)
class FMN:
    r"""The closest adversarial example: eps follows the boundary while delta climbs the margin inside the ball of radius eps.

    delta = project(delta + alpha * g / ||g||_2, eps). Once a row was fooled, eps shrinks by 1 - gamma where it is fooled and
    grows by 1 + gamma where it is not.

    Until then eps is ||delta||_p + |L| / ||g||_q, the distance at which the linear model of the margin crosses zero. Here
    this differs from the paper, whose rule can approach a boundary from inside for ever, or end in a corner of the range: eps
    grows by 1 + gamma on top and never shrinks, delta is put on the sphere of radius eps rather than inside it, and neither
    alpha nor gamma is annealed.

    Pintor, Roli, Brendel and Biggio, 2021, "Fast minimum-norm adversarial attacks through adaptive norm constraints",
    https://arxiv.org/abs/2102.12827.

    Arguments:
        steps: How many gradients are taken.
        alpha: The first step of delta, as a share of the data's range (of 1 where the range is not finite).
        gamma: The first relative step of eps.
    """

    steps: int = 100
    alpha: float = 1.0
    gamma: float = 0.05
    access = Access.GRADIENTS
    norms = (math.inf, 2.0, 1.0, 0.0)
    minimum = True
    paper = "Pintor et al. 2021"

    def __post_init__(self) -> None:
        check_whole("fmn: steps", self.steps, 1)
        check_positive("fmn: alpha", self.alpha)
        check_positive("fmn: gamma", self.gamma)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        p, width = threat.p, threat.high - threat.low
        step = self.alpha * (width if width < math.inf else 1.0)
        x_t = x
        best = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        eps = torch.full_like(best, 1.0 if p == 0 else 0.0)
        for k in range(self.steps):
            L, g = oracle.grad(x_t, margin)
            size = lp_norm(x_t - x, p)
            fooled = L > 0
            best = torch.where(fooled, torch.minimum(best, size), best)
            never = best == math.inf
            anneal = (1 + math.cos(math.pi * k / self.steps)) / 2
            alpha = torch.where(never, step * (L0_STEP if p == 0 else 1.0), step * (0.01 + 0.99 * anneal))
            gamma = torch.where(never, self.gamma, self.gamma * (0.02 + 0.98 * anneal))
            if p == 0:
                eps = _count(eps, best, fooled, gamma)
            else:
                crossing = size + L.abs() / lp_norm(g, dual(p)).clamp(min=torch.finfo(g.dtype).tiny)
                missed = torch.where(never, torch.maximum(crossing, eps), eps) * (1 + gamma)
                eps = torch.where(fooled, torch.minimum(torch.where(eps > 0, eps, size) * (1 - gamma), best), missed)
            delta = x_t - x + per_row(alpha, x) * steepest(g, 2)
            delta = where(never, _stretch(delta, p, eps), delta)
            x_t = (x + project(delta, p, eps)).clamp(threat.low, threat.high)
        return x_t


def _count(eps: Tensor, best: Tensor, fooled: Tensor, gamma: Tensor) -> Tensor:
    """The next eps of l_0, a whole number that moves by one at least, with shape (N,)."""
    fewer = torch.minimum(torch.minimum(eps - 1, (eps * (1 - gamma)).floor()), best)
    more = torch.maximum(eps + 1, (eps * (1 + gamma)).floor())
    return torch.where(fooled, fewer, more).clamp(min=0)


def _stretch(delta: Tensor, p: float, eps: Tensor) -> Tensor:
    """``delta`` on the sphere of radius eps, if it was inside; in l_0, where scaling changes nothing, as it is."""
    if p == 0:
        return delta
    longer = eps / lp_norm(delta, p).clamp(min=torch.finfo(delta.dtype).tiny)
    return delta * per_row(longer.clamp(min=1.0, max=1e6), delta)
