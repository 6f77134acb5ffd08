"""GradAlign: one-step training that keeps the gradient the same inside the ball.

Symbols: x' is what FGSM makes of x, CE the cross entropy, g(x) its gradient in x, eta uniform in the ball.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.attacks import FGSM
from advkit.defenses.adversary import Adversarial, ball_of, check_adversary, logits, ramped
from advkit.engine import perturb
from advkit.spec import check_at_least
from advkit.streams import Streams
from advkit.threat import Lp


@dataclass(frozen=True)
class GradAlign(Adversarial):
    r"""CE(x') + lam * (1 - cos(g(x), g(x + eta))).

    Andriushchenko and Flammarion, 2020, "Understanding and improving fast adversarial training",
    https://arxiv.org/abs/2007.02617. Where the two gradients point the same way, one step is as good as many. Examples with
    a gradient of 0 have no penalty. Both gradients are of the model in evaluation mode.

    Arguments:
        threat: A ball with a radius.
        lam: The weight of the penalty, lambda: the paper's 0.2 for CIFAR-10 at 8/255; larger radii need more.
        ramp: The share of the training in which the radius grows to its full size; 0 for a constant one.
        smoothing: The share of the label that is spread over all classes, in CE(x').

    Raises:
        UsageError: A setting out of range, or a threat model that is not a ball of l_inf, l_2 or l_1.
    """

    threat: Lp
    lam: float = 0.2
    ramp: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        ball_of(self.threat, "gradalign takes")
        check_at_least("gradalign: lam", self.lam, 0)
        check_adversary("gradalign", FGSM(), self.threat, self.ramp, self.smoothing)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """x', with shape (B, *)."""
        return perturb(FGSM(), model, x, y, ramped(self.threat, self.ramp, at), rng=rng)

    def value(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The mean loss, with shape ()."""
        threat = ball_of(ramped(self.threat, self.ramp, at), "gradalign takes")
        near = threat.start(x, Streams.of(rng, len(x), x.device))
        penalty = _misaligned(model, x, near, y)
        return F.cross_entropy(logits(model, x_adv), y, label_smoothing=self.smoothing) + self.lam * penalty


def _misaligned(model: nn.Module, x: Tensor, near: Tensor, y: Tensor) -> Tensor:
    """The mean of 1 - cos(g(x), g(near)), with shape () and a graph to the parameters."""
    z = torch.cat([x, near]).detach().requires_grad_(True)
    with _evaluating(model):
        total = F.cross_entropy(logits(model, z), y.repeat(2), reduction="sum")
    (g,) = torch.autograd.grad(total, z, create_graph=True)
    a, b = g.flatten(1).chunk(2)
    flat = (a == 0).all(1) | (b == 0).all(1)
    return torch.where(flat, 0.0, 1 - F.cosine_similarity(a, b, eps=torch.finfo(g.dtype).tiny)).mean()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's flag is put back at the end."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag
