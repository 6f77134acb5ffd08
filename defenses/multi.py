"""Adversarial training against several threat models at once.

Symbols: x'_i is what PGD makes of x inside the i-th threat model, CE the cross entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import norms
from advkit.attacks import PGD
from advkit.defenses.adversary import Adversarial, check_adversary, logits, ramped
from advkit.engine import frozen, perturb
from advkit.errors import UsageError
from advkit.losses import ce
from advkit.spec import check_choice
from advkit.threat import Change, Lp

RULES = {"worst": "max over i of CE(x'_i), example by example", "average": "the mean over i of CE(x'_i)"}
"""How the threat models are joined: MAX and AVG of the paper."""


@dataclass(frozen=True)
class MultiTraining(Adversarial):
    r"""The greatest CE(x'_i) of each example, or the mean of them.

    Tramer and Boneh, 2019, "Adversarial training and robustness for multiple perturbations",
    https://arxiv.org/abs/1904.13000.

    Arguments:
        threat: What the adversaries may change, at least two, each with a radius.
        steps: How many gradients each attack takes; each has PGD's default step.
        rule: ``worst`` or ``average``.
        ramp: The share of the training in which the radii grow to their full sizes; 0 for constant ones.
        smoothing: The share of the label that is spread over all classes.

    Raises:
        UsageError: A setting out of range, fewer than two threat models, or one that PGD does not serve.
    """

    threat: tuple[Lp | Change, ...]
    steps: int = 10
    rule: str = "worst"
    ramp: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.threat, tuple) or len(self.threat) < 2:
            raise UsageError(f"multi: threat is {self.threat}; it should be two or more threat models (--threat given twice)")
        check_choice("multi: rule", self.rule, RULES)
        for threat in self.threat:
            check_adversary("multi", PGD(self.steps), threat, self.ramp, self.smoothing)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The worst x'_i of each example, with shape (B, *); with the rule ``average`` all, (T * B, *), one threat's first."""
        threats = [ramped(threat, self.ramp, at) for threat in self.threat]
        found = [perturb(PGD(self.steps), model, x, y, threat, rng=rng) for threat in threats]
        return _worst(model, found, y) if self.rule == "worst" else torch.cat(found)

    def value(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The mean loss, with shape ()."""
        return F.cross_entropy(logits(model, x_adv), y.repeat(len(x_adv) // len(x)), label_smoothing=self.smoothing)


def _worst(model: nn.Module, found: list[Tensor], y: Tensor) -> Tensor:
    """Of several inputs for each example, each (B, *), that with the greatest loss."""
    with frozen(model), torch.no_grad():
        values = [ce(logits(model, x_adv), y) for x_adv in found]
    worst, most = found[0], values[0]
    for x_adv, value in zip(found[1:], values[1:], strict=True):
        worst, most = norms.where(value > most, x_adv, worst), torch.maximum(value, most)
    return worst
