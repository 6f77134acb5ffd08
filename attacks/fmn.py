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
from advkit.norms import dual, lp_norm, per_row, project
from advkit.oracle import Access, Oracle
from advkit.spec import check_at_least, check_positive
from advkit.streams import Streams
from advkit.threat import Lp


@dataclass(frozen=True)
class FMN:
    r"""The closest adversarial example: eps follows the boundary while delta climbs the margin on the sphere of radius eps.

    delta = project(delta + alpha * g / ||g||_2, eps). Until a row is first fooled, eps = (1 + gamma) * (||delta||_p + |L| /
    ||g||_q), just past where the linear model of the margin crosses zero; from then on eps shrinks by 1 - gamma where it is
    fooled and grows by 1 + gamma where it is not. (The paper's first rule has no factor 1 + gamma; without it a margin that
    bends towards the label is approached from inside and never crossed.)

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
        check_at_least("fmn: steps", self.steps, 1)
        check_positive("fmn: alpha", self.alpha)
        check_positive("fmn: gamma", self.gamma)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        p, width = threat.p, threat.high - threat.low
        scale = width if width < math.inf else 1.0
        x_t = x
        best = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        eps = torch.ones_like(best) if p == 0 else best
        for k in range(self.steps):
            anneal = (1 + math.cos(math.pi * k / self.steps)) / 2
            alpha = scale * self.alpha * (0.01 + 0.99 * anneal)
            gamma = self.gamma * (0.02 + 0.98 * anneal)
            L, g = oracle.grad(x_t, margin)
            size = lp_norm(x_t - x, p)
            fooled = L > 0
            best = torch.where(fooled, torch.minimum(best, size), best)
            eps = _radius(p, eps, size, best, fooled, L, g, gamma)
            delta = x_t - x + alpha * g / per_row(lp_norm(g, 2).clamp(min=torch.finfo(g.dtype).tiny), g)
            x_t = (x + project(delta, p, eps)).clamp(threat.low, threat.high)
        return x_t


def _radius(p: float, eps: Tensor, size: Tensor, best: Tensor, fooled: Tensor, L: Tensor, g: Tensor, gamma: float) -> Tensor:
    """The next eps of each row, with shape (N,)."""
    if p == 0:
        shrunk = torch.minimum(torch.minimum(eps - 1, (eps * (1 - gamma)).floor()), best)
        return torch.where(fooled, shrunk, torch.maximum(eps + 1, (eps * (1 + gamma)).floor())).clamp(min=0)
    slope = lp_norm(g, dual(p)).clamp(min=torch.finfo(g.dtype).tiny)
    missed = torch.where(best < math.inf, eps, size + L.abs() / slope) * (1 + gamma)
    return torch.where(fooled, torch.minimum(eps * (1 - gamma), best), missed)
