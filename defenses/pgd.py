"""Adversarial training with projected gradient descent.

Symbols: x' is the last iterate of the attack on x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.attacks import PGD
from advkit.defenses.adversary import Adversarial, check_adversary, ramped, shrunk
from advkit.engine import perturb
from advkit.threat import Change, Lp


@dataclass(frozen=True)
class PGDTraining(Adversarial):
    r"""The cross entropy at x', where x' is found by PGD against the model as it stands.

    Madry, Makelov, Schmidt, Tsipras and Vladu, 2018, "Towards deep learning models resistant to adversarial attacks",
    https://arxiv.org/abs/1706.06083.

    Arguments:
        threat: What the adversary may change, with a radius.
        steps: How many gradients the attack takes.
        step: Its step at the full radius, in the units of the data; by default PGD's own, 2.5 * eps / steps.
        ramp: The share of the training in which the radius grows to its full size; 0 for a constant one.
        smoothing: The share of the label that is spread over all classes.

    Raises:
        UsageError: A setting out of range, or a threat model that PGD does not serve.
    """

    threat: Lp | Change
    steps: int = 7
    step: float | None = None
    ramp: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_adversary("pgd", PGD(self.steps, self.step), self.threat, self.ramp, self.smoothing)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """PGD's last iterate, with shape (B, *)."""
        threat = ramped(self.threat, self.ramp, at)
        return perturb(PGD(self.steps, shrunk(self.step, self.threat, threat)), model, x, y, threat, rng=rng)
