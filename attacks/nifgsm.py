"""NI-FGSM: momentum whose gradient is taken where the momentum leads, after Nesterov.

Symbols: x_t is the iterate, alpha the step, v the running sum of gradients, mu its decay, x_nes the point ahead, g the
gradient of the loss there.
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
class NIFGSM:
    r"""x_{t+1} = project(x_t + alpha * steepest(v)), v = mu * v + g_hat, g taken at x_nes = x_t + alpha * mu * v.

    Lin, Song, He, Wang and Hopcroft, 2020, "Nesterov accelerated gradient and scale invariance for adversarial attacks",
    https://arxiv.org/abs/1908.06281. There g_hat = g / ||g||_1, with which the look ahead would all but vanish in many
    dimensions; here g_hat is g with the l_1 norm of one step, steepest(g), which in l_inf is the mean that the authors'
    program divides by.

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
    paper = "Lin et al. 2020"

    def __post_init__(self) -> None:
        check_whole("ni-fgsm: steps", self.steps, 1)
        check_positive("ni-fgsm: step", self.step)
        check_choice("ni-fgsm: loss", self.loss, LOSSES)
        check_at_least("ni-fgsm: momentum", self.momentum, 0)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        alpha = threat.eps / self.steps if self.step is None else self.step
        x_t, v = x, torch.zeros_like(x)
        for _ in range(self.steps):
            _, g = oracle.grad(x_t + alpha * self.momentum * v, LOSSES[self.loss])
            length = lp_norm(threat.steepest(g), 1) / lp_norm(g, 1).clamp(min=torch.finfo(g.dtype).tiny)
            v = self.momentum * v + g * per_row(length, g)
            x_t = threat.project(x_t + alpha * threat.steepest(v), x)
        return x_t
