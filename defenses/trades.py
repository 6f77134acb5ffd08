"""TRADES: clean accuracy, and answers that do not change nearby.

Symbols: f(x) are the probabilities that the model gives x, x' is the input in the ball whose probabilities are farthest from
f(x), CE the cross entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.defenses.adversary import Adversarial, Ascent, both, check_adversary, ramped, shrunk
from advkit.engine import perturb
from advkit.losses import kl
from advkit.spec import check_at_least, check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Change, Lp

SPREAD = 0.001
"""The standard deviation of the start, next to x, where the gradient of the divergence is 0."""


def nearby(x: Tensor, threat: Lp, rng: Streams) -> Tensor:
    """A Gaussian start next to x, with shape (N, *)."""
    return x + SPREAD * rng.normal(*x.shape[1:], dtype=x.dtype)


@dataclass(frozen=True)
class TRADES(Adversarial):
    r"""CE(x) + beta * KL(f(x) || f(x')), where x' maximizes the divergence by PGD from a Gaussian start next to x.

    Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan, 2019, "Theoretically principled trade-off between robustness and accuracy",
    https://arxiv.org/abs/1901.08573. x and x' go through the model in one pass.

    Arguments:
        threat: What the adversary may change, with a radius.
        beta: The weight of the divergence: the greater, the more robust and the less accurate.
        steps: How many gradients the attack takes.
        step: Its step at the full radius, in the units of the data; by default 2.5 * eps / steps, which is close to the
            paper's 0.007 for 10 steps at 0.031.
        ramp: The share of the training in which the radius grows to its full size; 0 for a constant one.
        smoothing: The share of the label that is spread over all classes, in CE.

    Raises:
        UsageError: A setting out of range, or a threat model that is not of l_inf, l_2 or l_1.
    """

    threat: Lp | Change
    beta: float = 6.0
    steps: int = 10
    step: float | None = None
    ramp: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("trades: beta", self.beta, 0)
        check_whole("trades: steps", self.steps, 1)
        check_positive("trades: step", self.step)
        check_adversary("trades", Ascent(nearby, self.steps, self.step), self.threat, self.ramp, self.smoothing)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """x', with shape (B, *)."""
        threat = ramped(self.threat, self.ramp, at)
        attack = Ascent(nearby, self.steps, shrunk(self.step, self.threat, threat))
        return perturb(attack, model, x, y, threat, rng=rng)

    def value(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The mean loss, with shape ()."""
        z, z_adv = both(model, x, x_adv)
        return F.cross_entropy(z, y, label_smoothing=self.smoothing) + self.beta * kl(z_adv, z).mean()
