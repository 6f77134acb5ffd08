"""Adversarial training of a smoothed model.

Symbols: F(x) are the probabilities, n_1 ... n_m draws of N(0, I), sigma the standard deviation of the noise, x' the last
iterate of the attack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.attacks import PGD
from advkit.defenses.adversary import check_adversary, ramped
from advkit.defenses.certificates.smoothing import Soft
from advkit.engine import perturb
from advkit.oracle import logits_of
from advkit.spec import check_positive, check_whole
from advkit.threat import Lp


@dataclass(frozen=True)
class SmoothAdv:
    r"""The cross entropy at x' + sigma * n_i, where x' maximizes -log(mean_i F(x' + sigma * n_i)_y) with the same n_i.

    Salman, Yang, Li, Zhang, Zhang, Razenshteyn and Bubeck, 2019, "Provably robust deep learning via adversarially trained
    smoothed classifiers", https://arxiv.org/abs/1906.04584: the attack is on the smoothed model, so that is what grows
    robust.

    Arguments:
        threat: What the adversary may change, with a radius; in l_2, as what smoothing certifies.
        sigma: The standard deviation; the same as that of the certificate.
        steps: How many gradients the attack takes; each step is 2 * eps / steps.
        m: How many noisy copies of each input.
        ramp: The share of the training in which the radius grows.

    Raises:
        UsageError: A number out of range, or a threat model that PGD does not serve.
    """

    threat: Lp
    sigma: float = 0.5
    steps: int = 2
    m: int = 2
    ramp: float = 0.1

    def __post_init__(self) -> None:
        check_positive("smoothadv: sigma", self.sigma)
        check_whole("smoothadv: steps", self.steps, 1)
        check_whole("smoothadv: m", self.m, 1)
        check_adversary("smoothadv", PGD(self.steps), self.threat, self.ramp)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float = 1.0) -> Tensor:
        """The mean over the batch and its copies, with shape ()."""
        noise = torch.randn((self.m, *x.shape), generator=rng, device=rng.device, dtype=x.dtype).to(x.device) * self.sigma
        threat = ramped(self.threat, self.ramp, at)
        attack = PGD(self.steps, 2 * threat.eps / self.steps, start=False)
        x_adv = perturb(attack, Soft(model, noise), x, y, threat, rng=rng)
        return F.cross_entropy(logits_of(model((x_adv + noise).flatten(0, 1))), y.repeat(self.m))
