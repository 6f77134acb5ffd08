"""N-FGSM: one step from strong noise, and no projection.

Symbols: eta is uniform noise of k times the radius, alpha the step as a multiple of the radius, g the gradient at x + eta.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.defenses.adversary import Adversarial, Ascent, ball_of, check_adversary, ramped
from advkit.engine import perturb
from advkit.losses import ce
from advkit.spec import check_positive
from advkit.streams import Streams
from advkit.threat import Lp


@dataclass(frozen=True)
class NFGSM(Adversarial):
    r"""The cross entropy at x' = x + eta + alpha * eps * steepest(g), which is kept in the range but not in the ball.

    De Jorge, Bibi, Volpi, Sanyal, Torr, Rogez and Dokania, 2022, "Make some noise: reliable and efficient single-step
    adversarial training", https://arxiv.org/abs/2202.01181.

    Arguments:
        threat: A ball with a radius.
        k: The noise, as a multiple of the radius.
        alpha: The step, as a multiple of the radius.
        ramp: The share of the training in which the radius grows to its full size; 0 for a constant one.
        smoothing: The share of the label that is spread over all classes.

    Raises:
        UsageError: A setting out of range, or a threat model that is not a ball of l_inf, l_2 or l_1.
    """

    threat: Lp
    k: float = 2.0
    alpha: float = 1.0
    ramp: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        ball_of(self.threat, "n-fgsm takes")
        check_positive("n-fgsm: k", self.k)
        check_positive("n-fgsm: alpha", self.alpha)
        check_adversary("n-fgsm", Ascent(self._noise, 1, loss=ce), self.threat, self.ramp, self.smoothing)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """x', with shape (B, *)."""
        threat = ramped(self.threat, self.ramp, at)
        # So wide that neither the noise nor the step leaves it: what is left of the projection is the range.
        wide = dataclasses.replace(self.threat, eps=(self.k + self.alpha) * threat.eps)
        return perturb(Ascent(self._noise, 1, self.alpha * threat.eps, ce), model, x, y, wide, rng=rng)

    def _noise(self, x: Tensor, wide: Lp, rng: Streams) -> Tensor:
        return dataclasses.replace(wide, eps=wide.eps * self.k / (self.k + self.alpha)).start(x, rng)
