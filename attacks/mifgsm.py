"""MI-FGSM: the basic iterative method with momentum, whose examples fool other models more often.

Symbols: x_t is the iterate, alpha the step, g the gradient of the loss at x_t, v its running sum, mu the decay of v.
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


@dataclass(frozen=True)
class MIFGSM:
    r"""x_{t+1} = project(x_t + alpha * steepest(v)), v = mu * v + g / ||g||_1, from x_0 = x.

    Dong, Liao, Pang, Su, Zhu, Hu and Li, 2018, "Boosting adversarial attacks with momentum", https://arxiv.org/abs/1710.06081.

    Arguments:
        steps: How many gradients are taken.
        step: alpha, in the units of the data; by default eps / steps, with which the edge of the ball is just reached.
        loss: What is maximized, by its name.
        momentum: mu; with 1 the gradients of all steps count the same.
    """

    steps: int = 10
    step: float | None = None
    loss: str = "ce"
    momentum: float = 1.0
    access = Access.GRADIENTS
    norms = (math.inf, 2.0)
    minimum = False
    paper = "Dong et al. 2018"

    def __post_init__(self) -> None:
        check_whole("mi-fgsm: steps", self.steps, 1)
        check_positive("mi-fgsm: step", self.step)
        check_choice("mi-fgsm: loss", self.loss, LOSSES)
        check_at_least("mi-fgsm: momentum", self.momentum, 0)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        alpha = threat.eps / self.steps if self.step is None else self.step
        x_t, v = x, torch.zeros_like(x)
        for _ in range(self.steps):
            _, g = oracle.grad(x_t, LOSSES[self.loss])
            v = self.momentum * v + g / per_row(lp_norm(g, 1).clamp(min=torch.finfo(g.dtype).tiny), g)
            x_t = threat.project(x_t + alpha * threat.steepest(v), x)
        return x_t
