"""One change for many inputs, learned from a data set: what universal perturbations and patches have in common.

Symbols: theta is the change, x a batch of B inputs drawn from the data, show(x, theta) what the model sees, g the gradient in
theta of the mean loss, m and v the running means of g and of g^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.engine import check_device, frozen
from advkit.errors import AccessError, UsageError
from advkit.losses import Loss
from advkit.oracle import Goal, Model, answer, check_outputs
from advkit.streams import Streams

Show = Callable[[Tensor, Tensor, Streams], Tensor]
"""(inputs, the change, one random stream for each input) to what the model sees; differentiable in the change."""

MEMORY = 0.9, 0.99
"""The shares of m and v that a step keeps."""


@dataclass(frozen=True)
class Progress:
    """Where a fit stands.

    Attributes:
        step: How many steps are done.
        steps: How many there are.
        rate: The running share of inputs that met the goal.
        theta: The change as it is now.
    """

    step: int
    steps: int
    rate: float
    theta: Tensor


@dataclass(frozen=True)
class Ascent:
    r"""theta <- project(theta + alpha_t * m / sqrt(v)), with g from another batch at each step.

    Adam's step (Kingma and Ba, 2015, "Adam: a method for stochastic optimization", https://arxiv.org/abs/1412.6980) with a
    rate that falls from alpha to 0 along half a cosine.

    Arguments:
        steps: How many batches.
        batch_size: B.
        alpha: The first and greatest step, in the units of the data.
        cap: The greatest loss that counts: what is fooled well already does not pull any more; inf for no limit.
        even: Whether v is its mean over the entries, so that a step goes along m; in a round ball, entries that are each
            scaled by their own v would end in a corner of the cube inside it.
    """

    steps: int
    batch_size: int
    alpha: float
    cap: float = math.inf
    even: bool = False

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        theta: Tensor,
        show: Show,
        project: Callable[[Tensor], Tensor],
        *,
        loss: Loss,
        goal: Goal,
        rng: torch.Generator,
        report: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """The change after the last step.

        Arguments:
            model: Inputs (N, *) to logits (N, K); used in evaluation mode, and left as it was.
            x: The inputs, with shape (N, *).
            y: Their labels, or targets where the goal is targeted, with shape (N,).
            theta: The change to start from.
            show: What the model sees.
            project: A change to one that is allowed.
            loss: What is maximized, or minimized where the goal is targeted.
            goal: What counts as success.
            rng: Where the batches and the streams come from.
            report: Called after each step.

        Raises:
            UsageError: There are no inputs, or not one label for each.
            AccessError: The model gives no gradient.
        """
        if not len(x) or len(x) != len(y):
            raise UsageError(
                f"there are {len(x)} inputs and {len(y)} labels to fit; there should be one label for each, at least one"
            )
        check_device(model, x)
        m, v, rate = torch.zeros_like(theta), torch.zeros_like(theta), 0.0
        batches = _Batches(len(x), min(self.batch_size, len(x)), rng)
        with torch.inference_mode(False), frozen(model):
            for step in range(self.steps):
                who = batches.next().to(x.device)
                streams = Streams.of(rng, len(who), x.device)
                g, met = self._gradient(model, x[who], y[who], theta, show, loss, goal, streams)
                square = g.square().mean() if self.even else g.square()
                m, v = MEMORY[0] * m + (1 - MEMORY[0]) * g, MEMORY[1] * v + (1 - MEMORY[1]) * square
                m_hat, v_hat = (mean / (1 - keep ** (step + 1)) for keep, mean in zip(MEMORY, (m, v), strict=True))
                alpha = self.alpha * (1 + math.cos(math.pi * step / self.steps)) / 2
                theta = project(theta + alpha * m_hat / (v_hat.sqrt() + torch.finfo(g.dtype).tiny))
                keep = min(MEMORY[0], step / (step + 1))
                rate = keep * rate + (1 - keep) * met
                if report is not None:
                    report(Progress(step + 1, self.steps, rate, theta))
        return theta

    def _gradient(
        self, model: Model, x: Tensor, y: Tensor, theta: Tensor, show: Show, loss: Loss, goal: Goal, streams: Streams
    ) -> tuple[Tensor, float]:
        """The gradient to ascend, and the share that met the goal."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_(True)
            outputs = answer(model, show(x, theta, streams))
            check_outputs(outputs, y, goal)
            if not outputs.requires_grad:
                raise AccessError("the model gives no gradient with respect to its input; fit on one that does, and transfer")
            values = loss(outputs, y)
            gain = -values.clamp(min=-self.cap) if goal.targeted else values.clamp(max=self.cap)
            (g,) = torch.autograd.grad(gain.mean(), theta)
        return g.nan_to_num(0.0, 0.0, 0.0), float(goal.met(outputs.detach(), y).double().mean())


class _Batches:
    """Numbers of examples, in a new random order each time they run out."""

    def __init__(self, n: int, size: int, rng: torch.Generator) -> None:
        self.n, self.size, self.rng = n, size, rng
        self.left = torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        """The next batch, with shape (B,)."""
        if len(self.left) < self.size:
            self.left = torch.randperm(self.n, generator=self.rng, device=self.rng.device).cpu()
        batch, self.left = self.left[: self.size], self.left[self.size :]
        return batch
