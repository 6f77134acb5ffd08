"""What the adversarial losses share: a radius that grows, examples and then a loss at them, checks of settings.

Symbols: x' is what the adversary makes of x; at is how far the training is, in [0, 1], as a share of all steps; g is the
gradient of the adversary's loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.engine import Attack, check_serves
from advkit.errors import UsageError
from advkit.losses import Loss, kl
from advkit.oracle import Access, Model, Oracle, logits_of
from advkit.sound.threats import Decibels
from advkit.spec import check_between, check_share
from advkit.streams import Streams
from advkit.threat import Change, Lp

LEAST = 1e-3
"""The share of the radius that a ramp begins with: the radius of a threat model is greater than 0."""
SHARE = 0.01
"""The share of the entries that move in an l_1 step, as in PGD."""


def ramped(threat: Lp | Change, ramp: float, at: float) -> Lp | Change:
    """The threat model with its radius times min(1, at / ramp), and at least ``LEAST`` of it (in l_0, one entry).

    Training at a large radius may never begin: at first nothing is learned but that all inputs look the same.

    Arguments:
        threat: What the adversary may change.
        ramp: The share of the training in which the radius grows, in [0, 1]; 0 for a constant one.
        at: How far the training is, in [0, 1].

    Raises:
        UsageError: A ramp for a threat model that has no single radius.
    """
    if not ramp:
        return threat
    return sized(threat, threat.eps * min(1.0, max(at / ramp, LEAST)), "a ramp needs")


def sized(threat: Lp | Change, eps: float, who: str) -> Lp | Change:
    """The threat model with another radius, in l_0 at least one entry.

    Raises:
        UsageError: It has no single radius.
    """
    if isinstance(threat, Decibels):
        return threat.with_eps(eps)
    ball = ball_of(threat, who)
    return dataclasses.replace(ball, eps=max(eps, 1.0) if ball.p == 0 else eps)


def ball_of(threat: Lp | Change, who: str) -> Lp:
    """The threat model, where it is an l_p ball of inputs.

    Raises:
        UsageError: It is not.
    """
    if not isinstance(threat, Lp):
        raise UsageError(f"the threat model is {threat}; {who} one with a single radius, as linf(0.3)")
    return threat


def shrunk(step: float | None, threat: Lp | Change, now: Lp | Change) -> float | None:
    """A step, (units of the data), for the ramped threat model ``now``: as large a share of its radius."""
    return step if step is None else step * now.eps / threat.eps


def check_adversary(name: str, attack: Attack, threat: Lp | Change, ramp: float, smoothing: float = 0.0) -> None:
    """Refuse settings that no adversarial loss takes; ``name`` is the loss's, ``attack`` is what it finds x' with.

    Raises:
        UsageError: The attack does not serve the threat model, or a share is out of range.
    """
    check_serves(attack, threat)
    check_between(f"{name}: ramp", ramp)
    if ramp:
        sized(threat, threat.eps, f"{name}: ramp needs")
    check_share(f"{name}: smoothing", smoothing)


def logits(model: Model, x: Tensor) -> Tensor:
    """The model's logits, (B, K), in float32 or better."""
    return exact(logits_of(model(x)))


def exact(z: Tensor) -> Tensor:
    """Logits in float32 or better: under autocast a loss of bfloat16 logits would be coarse."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def both(model: Model, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """The logits for x and for x', each (B, K), in one pass.

    A batch norm so sees the mixture of both, which is what its running statistics describe in evaluation mode, and a model
    that is trained on several devices is called once before a backward pass, as it wants.
    """
    z, z_adv = logits(model, torch.cat([x, x_adv])).chunk(2)
    return z, z_adv


class Adversarial:
    """What the adversarial losses have in common: x' is found first, then the loss is taken with x' as given.

    A subclass is a dataclass; it says how x' is found, and what the loss is where it is not the cross entropy at x'.
    """

    ramp: float = 0.0
    smoothing: float = 0.0

    @property
    def settled(self) -> float:
        """The share of the training after which the radius has its full size."""
        return self.ramp

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float = 1.0) -> Tensor:
        """The mean loss over a batch.

        Arguments:
            model: Inputs (B, *) to logits (B, K); the adversary sees it in evaluation mode, the loss in the mode it is in.
            x: The inputs, with shape (B, *), inside the threat model's range.
            y: The labels, with shape (B,) and dtype int64.
            rng: Where random draws come from.
            at: How far the training is, in [0, 1].

        Returns:
            The loss, with shape ().

        Raises:
            UsageError: The inputs or labels are not of this form.
        """
        return self.value(model, x, self.examples(model, x, y, rng, at), y, rng, at)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """What the adversary makes of x, with shape (B, *), without a graph."""
        raise NotImplementedError

    def value(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The mean loss, with shape (), with a graph to the parameters: by default the cross entropy at x'."""
        return F.cross_entropy(logits(model, x_adv), y, label_smoothing=self.smoothing)


Start = Callable[[Tensor, Lp, Streams], Tensor]
"""(x, the ball, streams) to a first iterate, each (N, *); it may be outside the ball, as the next ones are not."""


@dataclass(frozen=True)
class Ascent:
    """x_{t+1} = project(x_t + alpha * steepest(g)), from a start that is the loss's own.

    Arguments:
        start: The first iterate.
        steps: How many gradients are taken.
        step: alpha, in the units of the data; by default 2.5 * eps / steps.
        loss: What is maximized; by default the divergence KL(f(x) || f(x_t)) from the answer for x.
    """

    start: Start
    steps: int
    step: float | None = None
    loss: Loss | None = None
    access = Access.GRADIENTS
    norms = (math.inf, 2.0, 1.0)
    minimum = False
    paper = "the training loss's own"

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        alpha = 2.5 * threat.eps / self.steps if self.step is None else self.step
        k = max(1, round(SHARE * x[0].numel()))
        loss = _divergence(exact(oracle.outputs(x))) if self.loss is None else self.loss
        x_t = self.start(x, threat, rng)
        for _ in range(self.steps):
            _, g = oracle.grad(x_t, loss)
            x_t = threat.project(x_t + alpha * threat.steepest(g, k), x)
        return x_t


def _divergence(reference: Tensor) -> Loss:
    """KL(reference || outputs), whatever the labels are."""
    return lambda outputs, y: kl(exact(outputs), reference)
