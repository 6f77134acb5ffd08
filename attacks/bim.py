"""The basic iterative method.

Symbols: x_t is the iterate, alpha the step, g the gradient of the loss at x_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from advkit.losses import LOSSES
from advkit.oracle import Access, Oracle
from advkit.spec import check_choice, check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp


@dataclass(frozen=True)
class BIM:
    r"""x_{t+1} = project(x_t + alpha * steepest(g)), from x_0 = x: FGSM in small steps.

    Kurakin, Goodfellow and Bengio, 2017, "Adversarial examples in the physical world", https://arxiv.org/abs/1607.02533.

    Arguments:
        steps: How many gradients are taken.
        step: alpha, in the units of the data; by default eps / steps, with which the edge of the ball is just reached.
        loss: What is maximized, by its name.
    """

    steps: int = 10
    step: float | None = None
    loss: str = "ce"
    access = Access.GRADIENTS
    norms = (math.inf, 2.0, 1.0)
    minimum = False
    paper = "Kurakin et al. 2017"

    def __post_init__(self) -> None:
        check_whole("bim: steps", self.steps, 1)
        check_positive("bim: step", self.step)
        check_choice("bim: loss", self.loss, LOSSES)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        alpha = threat.eps / self.steps if self.step is None else self.step
        x_t = x
        for _ in range(self.steps):
            _, g = oracle.grad(x_t, LOSSES[self.loss])
            x_t = threat.project(x_t + alpha * threat.steepest(g), x)
        return x_t
