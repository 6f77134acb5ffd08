"""Fast adversarial training: one step from a random start.

Symbols: x_0 is where the step begins, x' where it ends, alpha the step as a multiple of the radius.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.defenses.adversary import Adversarial, Ascent, check_adversary, ramped
from advkit.engine import perturb
from advkit.losses import ce
from advkit.spec import check_positive
from advkit.streams import Streams
from advkit.threat import Change, Lp


@dataclass(frozen=True)
class FastTraining(Adversarial):
    r"""The cross entropy at x' = project(x_0 + alpha * eps * steepest(g)), x_0 uniform in the ball, g the gradient at x_0.

    Wong, Rice and Kolter, 2020, "Fast is better than free: revisiting adversarial training",
    https://arxiv.org/abs/2001.03994. It can collapse from one epoch to the next, and then withstands its own step only;
    watch it with an attack of several steps. Without the random start it nearly always does. x_0 may lie outside the range of
    the data, as in the paper: were it clipped, black pixels would all end at 0 or eps.

    Arguments:
        threat: What the adversary may change, with a radius.
        alpha: The step, as a multiple of the radius.
        start: Whether to start at random in the ball rather than at x.
        ramp: The share of the training in which the radius grows to its full size; 0 for a constant one.
        smoothing: The share of the label that is spread over all classes.

    Raises:
        UsageError: A setting out of range, or a threat model that is not of l_inf, l_2 or l_1.
    """

    threat: Lp | Change
    alpha: float = 1.25
    start: bool = True
    ramp: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_adversary("fast", Ascent(self._start, 1, loss=ce), self.threat, self.ramp, self.smoothing)
        check_positive("fast: alpha", self.alpha)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """x', with shape (B, *)."""
        threat = ramped(self.threat, self.ramp, at)
        return perturb(Ascent(self._start, 1, self.alpha * threat.eps, ce), model, x, y, threat, rng=rng)

    def _start(self, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        if not self.start:
            return x
        return dataclasses.replace(threat, low=threat.low - threat.eps, high=threat.high + threat.eps).start(x, rng)
