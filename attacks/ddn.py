"""DDN: the direction and the norm of the perturbation, each on its own.

Symbols: delta is the perturbation, eps its norm, L the margin, g the gradient of the cross entropy, alpha the step, gamma how
fast eps moves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import ce, margin
from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

FIRST = 2.0
"""The first eps, as a multiple of the distance of the linear margin: from outside, the direction finds a closer boundary."""


@dataclass(frozen=True)
class DDN:
    r"""delta = eps * d / ||d||_2 with d = delta + alpha * g / ||g||_2.

    eps shrinks by 1 - gamma where the model is fooled and grows by 1 + gamma where it is not; alpha is annealed to a hundredth.

    The first step is of the margin L, to twice the distance at which its linear model crosses, eps = 2 * |L| / ||g||_2 (the
    paper's first eps is 1, whatever the data and the model); and gamma is annealed to a tenth, for a last eps that is closer.

    Rony, Hafemann, Oliveira, Ben Ayed, Sabourin and Granger, 2019, "Decoupling direction and norm for efficient
    gradient-based L2 adversarial attacks and defenses", https://arxiv.org/abs/1811.09600.

    Arguments:
        steps: How many gradients are taken.
        alpha: The first step, as a share of the data's range (of 1 where the range is not finite).
        gamma: The first relative step of eps.
    """

    steps: int = 100
    alpha: float = 1.0
    gamma: float = 0.05
    access = Access.GRADIENTS
    norms = (2.0,)
    minimum = True
    paper = "Rony et al. 2019"

    def __post_init__(self) -> None:
        check_whole("ddn: steps", self.steps, 1)
        check_positive("ddn: alpha", self.alpha)
        check_positive("ddn: gamma", self.gamma)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        width = threat.high - threat.low
        L, g = oracle.grad(x, margin)
        eps = (FIRST * L.abs().clamp(1e-6, 1e10) / lp_norm(g, 2).clamp(min=1e-10)).clamp(max=width * math.sqrt(x[0].numel()))
        step = self.alpha * (width if width < math.inf else 1.0)
        x_t = _on_sphere(g, eps, x, threat)
        for k in range(1, self.steps):
            L, g = oracle.grad(x_t, _ce_and_margin)
            anneal = (1 + math.cos(math.pi * k / self.steps)) / 2
            gamma = self.gamma * (0.1 + 0.9 * anneal)
            eps = eps * torch.where(L > 0, 1 - gamma, 1 + gamma)
            alpha = step * (0.01 + 0.99 * anneal)
            x_t = _on_sphere(x_t - x + alpha * threat.steepest(g), eps, x, threat)
        return x_t


def _on_sphere(d: Tensor, eps: Tensor, x: Tensor, threat: Lp) -> Tensor:
    """The point at x + d, with d scaled to the length eps, clipped; (N, *)."""
    longer = eps / lp_norm(d, 2).clamp(min=torch.finfo(d.dtype).tiny)
    return (x + d * per_row(longer, d)).clamp(threat.low, threat.high)


def _ce_and_margin(outputs: Tensor, y: Tensor) -> Tensor:
    """The margin, whose sign says what is fooled, with the gradient of the cross entropy."""
    L = ce(outputs, y)
    return margin(outputs, y).detach() + (L - L.detach())
