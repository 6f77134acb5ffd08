"""Auto-PGD in l_inf and l_2.

Symbols: x_t is the iterate, z the plain step from it, f the loss, g its gradient, eta the step of each row, a the share of the
plain step (the rest is momentum), w_j the checkpoints, rho the share of steps that must raise f, ``max`` the best so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import LOSSES
from advkit.norms import per_row, where
from advkit.oracle import Access, Oracle
from advkit.spec import check_choice, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

RHO = 0.75
A = 0.75


@dataclass(frozen=True)
class APGD:
    r"""PGD that finds its own step: x_{t+1} = project(x_t + a (z - x_t) + (1 - a) (x_t - x_{t-1})).

    z = project(x_t + eta * steepest(g)), and eta starts at 2 eps. At the checkpoints w_j, which come closer and closer, it is
    halved for the rows whose loss rose in fewer than rho of the steps since w_{j-1}, or whose best loss and step are those of
    w_{j-1}; these rows go on from their best iterate.

    Croce and Hein, 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
    https://arxiv.org/abs/2003.01690. Their targeted version is ``multi-targeted(apgd, n=9, loss="dlr")``.

    Arguments:
        steps: How many gradients are taken.
        loss: What is maximized, by its name.
    """

    steps: int = 100
    loss: str = "ce"
    access = Access.GRADIENTS
    norms = (math.inf, 2.0)
    minimum = False
    paper = "Croce and Hein 2020"

    def __post_init__(self) -> None:
        check_whole("apgd: steps", self.steps, 1)
        check_choice("apgd: loss", self.loss, LOSSES)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The best iterate, with shape (N, *)."""
        loss = LOSSES[self.loss]
        x_t = x_last = threat.start(x, rng)
        f, g = oracle.grad(x_t, loss)
        x_max, f_max, g_max = x_t, f, g
        eta = torch.full_like(f, 2 * threat.eps)
        rises, f_before, kept = torch.zeros_like(f), f, torch.zeros_like(f, dtype=torch.bool)
        w, previous = _checkpoints(self.steps), 0
        for t in range(1, self.steps):
            z = threat.project(x_t + per_row(eta, x) * threat.steepest(g), x)
            if t > 1:
                z = threat.project(x_t + A * (z - x_t) + (1 - A) * (x_t - x_last), x)
            x_last, x_t = x_t, z
            f_last, (f, g) = f, oracle.grad(x_t, loss)
            rises += f > f_last
            better = f > f_max
            x_max, g_max = where(better, x_t, x_max), where(better, g, g_max)
            f_max = torch.where(better, f, f_max)
            if t in w:
                halve = (rises < RHO * (t - previous)) | (kept & (f_max <= f_before))
                eta = torch.where(halve, eta / 2, eta)
                x_t, g, f = where(halve, x_max, x_t), where(halve, g_max, g), torch.where(halve, f_max, f)
                rises, f_before, kept, previous = torch.zeros_like(f), f_max, ~halve, t
        return x_max


def _checkpoints(steps: int) -> set[int]:
    """The steps after which eta may be halved: 22 % of all, then intervals shorter by 3 % each time, but at least 6 %."""
    w, share, interval = set[int](), 0.0, 0.22
    while share + interval < 1:
        share += interval
        w.add(max(1, math.ceil(share * steps)))
        interval = max(interval - 0.03, 0.06)
    return w
