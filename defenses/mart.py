"""MART: adversarial training that leans on the examples that the model gets wrong.

Symbols: f(x) are the probabilities that the model gives x, f_k(x) that of class k, y the label, x' what PGD makes of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.attacks import PGD
from advkit.defenses.adversary import Adversarial, both, check_adversary, ramped, shrunk
from advkit.engine import perturb
from advkit.losses import kl
from advkit.spec import check_at_least
from advkit.threat import Change, Lp


@dataclass(frozen=True)
class MART(Adversarial):
    r"""BCE(x') + lam * KL(f(x) || f(x')) * (1 - f_y(x)).

    BCE(x') = -log f_y(x') - log(1 - max over k != y of f_k(x')).

    Wang, Zou, Yi, Bailey, Ma and Gu, 2020, "Improving adversarial robustness requires revisiting misclassified examples",
    https://openreview.net/forum?id=rklOg6EFwS. x and x' go through the model in one pass.

    Arguments:
        threat: What the adversary may change, with a radius.
        lam: The weight of the divergence, lambda.
        steps: How many gradients the attack takes.
        step: Its step at the full radius, in the units of the data; by default 2.5 * eps / steps, which for 10 steps is the
            paper's eps / 4.
        ramp: The share of the training in which the radius grows to its full size; 0 for a constant one.

    Raises:
        UsageError: A setting out of range, or a threat model that PGD does not serve.
    """

    threat: Lp | Change
    lam: float = 5.0
    steps: int = 10
    step: float | None = None
    ramp: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("mart: lam", self.lam, 0)
        check_adversary("mart", PGD(self.steps, self.step), self.threat, self.ramp)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """x', with shape (B, *)."""
        threat = ramped(self.threat, self.ramp, at)
        return perturb(PGD(self.steps, shrunk(self.step, self.threat, threat)), model, x, y, threat, rng=rng)

    def value(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The mean loss, with shape ()."""
        z, z_adv = both(model, x, x_adv)
        wrong = 1 - z.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
        return (F.cross_entropy(z_adv, y, reduction="none") + _rival(z_adv, y) + self.lam * kl(z_adv, z) * wrong).mean()


def _rival(z: Tensor, y: Tensor) -> Tensor:
    """-log(1 - max over k != y of softmax(z)_k), with shape (B,); as the sum of the other classes, which is never 0."""
    rival = z.detach().scatter(1, y.unsqueeze(1), -torch.inf).argmax(1, keepdim=True)
    return z.logsumexp(1) - z.scatter(1, rival, -torch.inf).logsumexp(1)
