"""Auto-PGD in l_1.

Symbols: x_t is the iterate, f the loss, g its gradient, eta the step, k the share of the entries that move,
w_j the checkpoints, ``max`` the best so far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advkit.losses import LOSSES
from advkit.norms import lp_norm, per_row, where
from advkit.oracle import Access, Oracle
from advkit.spec import check_choice, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

FIRST_SHARE = 0.2
LEAST_STEP = 0.1
SHRINK = 1.5
RADII = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""The radii of the search, as multiples of eps, and the share of the steps at each."""


@dataclass(frozen=True)
class APGDL1:
    r"""x_{t+1} = project(x_t + eta * s), where s are the signs of the k largest entries of g, of length 1 in l_1.

    k follows the sparsity of the best perturbation so far, looked at every 4 % of the steps: k is what it has, over 1.5. Where
    it fell by over 5 % since, the row goes on from its best iterate with eta = eps; elsewhere eta shrinks by 1.5, down to
    eps / 10. The search begins in balls of 3 eps and 2 eps, whose best points are projected into the next. The projection is
    onto the ball and the range at once.

    Croce and Hein, 2021, "Mind the box: l_1-APGD for sparse adversarial attacks on image classifiers",
    https://arxiv.org/abs/2103.01208.

    Arguments:
        steps: How many gradients are taken.
        loss: What is maximized, by its name.
    """

    steps: int = 100
    loss: str = "ce"
    access = Access.GRADIENTS
    norms = (1.0,)
    minimum = False
    paper = "Croce and Hein 2021"

    def __post_init__(self) -> None:
        check_whole("apgd-l1: steps", self.steps, 1)
        check_choice("apgd-l1: loss", self.loss, LOSSES)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The best iterate inside the ball, with shape (N, *)."""
        x_t, left = replace(threat, eps=RADII[0][0] * threat.eps).start(x, rng), self.steps
        for factor, share in RADII:
            steps = left if factor == 1 else min(left - 1, round(share * self.steps))
            if steps:
                ball = replace(threat, eps=factor * threat.eps)
                x_t = self._climb(oracle, ball.project(x_t, x), x, ball, steps)
                left -= steps
        return x_t

    def _climb(self, oracle: Oracle, x_t: Tensor, x: Tensor, ball: Lp, steps: int) -> Tensor:
        """The best iterate of so many steps inside a ball."""
        loss, size, every = LOSSES[self.loss], x[0].numel(), max(1, round(0.04 * self.steps))
        f, g = oracle.grad(x_t, loss)
        x_max, f_max, g_max = x_t, f, g
        first = torch.full_like(f, FIRST_SHARE)
        start = lp_norm(x_t - x, 0) / size / SHRINK
        k, sparsity = torch.where(start > 0, start, first), lp_norm(x_t - x, 0)
        eta = torch.full_like(f, ball.eps)
        for t in range(1, steps):
            x_t = ball.project(x_t + per_row(eta, x) * _signs(g, k), x)
            f, g = oracle.grad(x_t, loss)
            better = f > f_max
            x_max, g_max = where(better, x_t, x_max), where(better, g, g_max)
            f_max = torch.where(better, f, f_max)
            if t % every == 0:
                now = lp_norm(x_max - x, 0)
                fell = now < 0.95 * sparsity
                eta = torch.where(fell, ball.eps, (eta / SHRINK).clamp(min=LEAST_STEP * ball.eps))
                x_t, g = where(fell, x_max, x_t), where(fell, g_max, g)
                k, sparsity = now / size / SHRINK, now
        return x_max


def _signs(g: Tensor, k: Tensor) -> Tensor:
    """The signs of the share k, (N,), of the entries of each row that are largest, at least one, over their number."""
    flat = g.flatten(1)
    n = (k * flat.shape[1]).long().clamp(1, flat.shape[1])
    least = flat.abs().sort(1, descending=True).values.gather(1, n.unsqueeze(1) - 1)
    signs = torch.where(flat.abs() >= least, flat.sign(), 0.0)
    return (signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).view_as(g)
