"""Adversarial training with projected gradient descent.

Symbols: x' is the last iterate of the attack on x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.attacks import PGD
from advkit.engine import perturb
from advkit.oracle import logits_of
from advkit.threat import Change, Lp


@dataclass(frozen=True)
class PGDTraining:
    r"""The cross entropy at x', where x' is found by PGD against the model as it stands.

    Madry, Makelov, Schmidt, Tsipras and Vladu, 2018, "Towards deep learning models resistant to adversarial attacks",
    https://arxiv.org/abs/1706.06083. With ``steps=1`` and ``step=1.25 * eps`` it is fast adversarial training (Wong, Rice
    and Kolter, 2020, https://arxiv.org/abs/2001.03994).

    Arguments:
        threat: What the adversary may change, with a radius.
        steps: How many gradients the attack takes.
        step: Its step, in the units of the data; PGD's own default where it is not given.
    """

    threat: Lp | Change
    steps: int = 7
    step: float | None = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """The mean over the batch, with shape ()."""
        x_adv = perturb(PGD(self.steps, self.step), model, x, y, self.threat, rng=rng)
        return F.cross_entropy(logits_of(model(x_adv)), y)
