"""Adversarial training with the fast gradient sign method.

Symbols: x' is what FGSM makes of x, CE the cross entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.attacks import FGSM
from advkit.defenses.adversary import Adversarial, both, check_adversary, ramped
from advkit.engine import perturb
from advkit.spec import check_between
from advkit.threat import Change, Lp


@dataclass(frozen=True)
class FGSMTraining(Adversarial):
    r"""alpha * CE(x) + (1 - alpha) * CE(x').

    Goodfellow, Shlens and Szegedy, 2015, "Explaining and harnessing adversarial examples",
    https://arxiv.org/abs/1412.6572. The paper's x' may leave the range of the data; here it is clipped.

    It is not a defense: with the true label in the step, x' tells the label (Kurakin, Goodfellow and Bengio, 2017,
    https://arxiv.org/abs/1611.01236), and the model learns to read it from one step and falls to several. It can make a
    model more accurate on clean inputs, for which the paper proposed it.

    Arguments:
        threat: What the adversary may change, with a radius.
        alpha: The weight of the clean inputs, in [0, 1].
        ramp: The share of the training in which the radius grows to its full size; 0 for a constant one.
        smoothing: The share of the label that is spread over all classes.

    Raises:
        UsageError: A setting out of range, or a threat model that FGSM does not serve.
    """

    threat: Lp | Change
    alpha: float = 0.5
    ramp: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_adversary("fgsm", FGSM(), self.threat, self.ramp, self.smoothing)
        check_between("fgsm: alpha", self.alpha)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """x', with shape (B, *)."""
        return perturb(FGSM(), model, x, y, ramped(self.threat, self.ramp, at), rng=rng)

    def value(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The mean loss, with shape ()."""
        clean, robust = (F.cross_entropy(z, y, label_smoothing=self.smoothing) for z in both(model, x, x_adv))
        return self.alpha * clean + (1 - self.alpha) * robust
