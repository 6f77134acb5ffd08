"""Universal perturbations: one delta for every input.

Symbols: delta is the perturbation, B the batch size, beta the greatest loss of an input that counts, alpha the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.engine import check_inputs
from advkit.errors import UsageError
from advkit.losses import LOSSES
from advkit.norms import norm_name
from advkit.oracle import Goal, Model
from advkit.spec import check_choice, check_positive, check_whole
from advkit.stochastic import Ascent, Progress
from advkit.threat import Lp


@dataclass(frozen=True)
class Universal:
    r"""Stochastic ascent on the mean over the data of min(L(x + delta), beta), projected to the ball after each step.

    The goal is that of Moosavi-Dezfooli, Fawzi, Fawzi and Frossard, 2017, "Universal adversarial perturbations",
    https://arxiv.org/abs/1610.08401, the algorithm that of Shafahi, Najibi, Xu, Dickerson, Davis and Goldstein, 2020,
    "Universal adversarial training", https://arxiv.org/abs/1811.11304. The loss is capped so that no input that is fooled
    already takes the whole gradient; the rate falls to 0, so that the last delta is not a noisy one.

    Arguments:
        steps: How many batches.
        batch_size: B.
        alpha: The first step, in multiples of eps.
        loss: What is maximized, by its name.
        beta: The cap of the loss.
    """

    steps: int = 500
    batch_size: int = 64
    alpha: float = 0.2
    loss: str = "ce"
    beta: float = 9.0
    norms = (math.inf, 2.0)
    paper = "Shafahi et al. 2020"

    def __post_init__(self) -> None:
        check_whole("universal: steps", self.steps, 1)
        check_whole("universal: batch_size", self.batch_size, 1)
        check_positive("universal: alpha", self.alpha)
        check_choice("universal: loss", self.loss, LOSSES)
        check_positive("universal: beta", self.beta)

    def fit(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Lp,
        *,
        goal: Goal | None = None,
        rng: torch.Generator,
        report: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """The perturbation, with the shape of one input, inside the ball.

        Arguments:
            model: Inputs (N, *) to logits (N, K); used in evaluation mode, and left as it was.
            x: The inputs to learn from, with shape (N, *).
            y: Their labels, with shape (N,) and dtype int64; the targets, where the goal is targeted.
            threat: How large delta may be, and the range of the data.
            goal: What counts as success; by default, any answer but y.
            rng: Where the order of the inputs comes from.
            report: Called after each step.

        Raises:
            UsageError: The inputs are not of this form, or the threat model has no radius or a norm that is not served.
            AccessError: The model gives no gradient.
        """
        if threat.p not in self.norms or threat.eps == math.inf:
            served = " and ".join(map(norm_name, self.norms))
            raise UsageError(f"universal serves {served} with a radius, as in linf(10/255); it was given {threat!r}")
        check_inputs(x, y, threat)
        ball = Lp(threat.p, threat.eps, -math.inf, math.inf)
        start = torch.zeros_like(x[0])
        ascent = Ascent(self.steps, self.batch_size, self._step(threat, start), self.beta, even=threat.p == 2)
        return ascent(
            model,
            x,
            y,
            start,
            lambda z, delta, _: (z + delta).clamp(threat.low, threat.high),
            lambda delta: ball.project(delta.unsqueeze(0), torch.zeros_like(delta).unsqueeze(0)).squeeze(0),
            loss=LOSSES[self.loss],
            goal=Goal() if goal is None else goal,
            rng=rng,
            report=report,
        )

    def _step(self, threat: Lp, start: Tensor) -> float:
        """The first step of an entry: a share of the radius, in l_2 of what each entry has of it."""
        return self.alpha * threat.eps / (1.0 if threat.p == math.inf else math.sqrt(start.numel()))

    def apply(self, x: Tensor, delta: Tensor, threat: Lp) -> Tensor:
        """The inputs with delta, inside the range, with shape (N, *), so inside the threat model."""
        return threat.project(x + delta, x)
