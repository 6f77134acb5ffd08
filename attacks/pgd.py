"""Projected gradient descent.

Symbols: x_t is the iterate, alpha the step, g the gradient of the loss at x_t, v its running sum, mu the momentum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import LOSSES
from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_at_least, check_choice, check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

L1_SHARE = 0.01
"""The share of the entries that move in an l_1 step: the 99th percentile of Tramer and Boneh, 2019."""


@dataclass(frozen=True)
class PGD:
    r"""x_{t+1} = project(x_t + alpha * steepest(v)), v = mu * v + g / ||g||_1, from a random x_0 in the ball.

    Madry, Makelov, Schmidt, Tsipras and Vladu, 2018, "Towards deep learning models resistant to adversarial attacks",
    https://arxiv.org/abs/1706.06083; with momentum, MI-FGSM of Dong et al., 2018, https://arxiv.org/abs/1710.06081. In l_1
    the largest hundredth of the entries share a step (Tramer and Boneh, 2019, https://arxiv.org/abs/1904.13000); in l_0 a
    step moves every entry in proportion to its gradient, the largest by alpha, and the projection keeps eps of them (Croce
    and Hein, 2019, https://arxiv.org/abs/1909.05040).

    Arguments:
        steps: How many gradients are taken.
        step: alpha, in the units of the data; by default 2.5 * eps / steps, so that the far side of the ball can be reached
            from any start, and in l_0 the width of the range.
        loss: What is maximized, by its name.
        start: Whether to start at random in the ball rather than at x.
        momentum: mu; 0 for the plain gradient.
    """

    steps: int = 40
    step: float | None = None
    loss: str = "ce"
    start: bool = True
    momentum: float = 0.0
    access = Access.GRADIENTS
    norms = (math.inf, 2.0, 1.0, 0.0)
    minimum = False
    paper = "Madry et al. 2018"

    def __post_init__(self) -> None:
        check_whole("pgd: steps", self.steps, 1)
        check_positive("pgd: step", self.step)
        check_choice("pgd: loss", self.loss, LOSSES)
        check_at_least("pgd: momentum", self.momentum, 0)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        alpha = self._alpha(threat)
        k = max(1, round(L1_SHARE * x[0].numel()))
        x_t = threat.start(x, rng) if self.start else x
        v = torch.zeros_like(x) if self.momentum else None
        for _ in range(self.steps):
            _, g = oracle.grad(x_t, LOSSES[self.loss])
            if v is not None:
                g = v = self.momentum * v + g / per_row(lp_norm(g, 1).clamp(min=torch.finfo(g.dtype).tiny), g)
            x_t = threat.project(x_t + alpha * threat.steepest(g, k), x)
        return x_t

    def _alpha(self, threat: Lp) -> float:
        if self.step is not None:
            return self.step
        return threat.width if threat.p == 0 else 2.5 * threat.eps / self.steps
