"""A classifier that may reject its input, and attacks that get a wrong answer out of it.

Symbols: z are the logits of the K classes, s(x) the score of the detector, t its threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.attacks.pgd import L1_SHARE
from advkit.combine import Lens, Wrapper
from advkit.engine import Attack
from advkit.errors import UsageError
from advkit.losses import Loss, margin
from advkit.norms import lp_norm, per_row, where
from advkit.oracle import Access, Goal, Oracle, Through, logits_of
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

LONGEST = 0.3
"""The first step of :class:`Selective`, as a share of the radius."""

MU = 0.75
"""Its momentum."""


class Rejecting(nn.Module):
    r"""K + 1 logits: those of the classifier, and max_k z_k + scale * (s(x) - t), which is the greatest where s(x) > t.

    After Carlini and Wagner, 2017, "Adversarial examples are not easily detected: bypassing ten detection methods",
    https://arxiv.org/abs/1705.07263, who multiply where this adds, so that it holds for logits of either sign.

    Arguments:
        model: Inputs (N, *) to logits (N, K).
        detector: Inputs to scores, with shape (N,).
        threshold: t.
        scale: Logits a unit of the score; whatever it is, the answer is the same.

    Raises:
        UsageError: The scale is not greater than 0.
    """

    def __init__(self, model: Callable[[Tensor], object], detector: nn.Module, threshold: float, scale: float = 1.0) -> None:
        super().__init__()
        check_positive("rejecting: scale", scale)
        self.model, self.detector, self.threshold, self.scale = model, detector, threshold, scale

    def forward(self, x: Tensor) -> Tensor:
        """The logits, with shape (N, K + 1)."""
        z = logits_of(self.model(x))
        rejected = z.amax(1) + self.scale * (self.detector(x) - self.threshold).to(z.dtype)
        return torch.cat([z, rejected.unsqueeze(1)], 1)


def merged(outputs: Tensor, y: Tensor) -> Tensor:
    """K logits out of K + 1, with shape (N, K): "y, or rejected" is one answer, the one that the adversary has to avoid."""
    label = y.unsqueeze(1)
    z, rejected = outputs[:, :-1], outputs[:, -1:]
    return z.scatter(1, label, torch.maximum(z.gather(1, label), rejected))


def right_or_rejected(outputs: Tensor, y: Tensor) -> Tensor:
    """Whether K + 1 logits say y or reject, with shape (N,) and dtype bool."""
    return merged(outputs, y).argmax(1) == y


UNNOTICED = Goal(says=right_or_rejected)
"""Success is a wrong class that is not rejected."""


@dataclass(frozen=True)
class Evade(Wrapper):
    r"""The attack on a :class:`Rejecting` model, to be run with the goal ``UNNOTICED``.

    To be rejected is as bad for the adversary as to be answered rightly. So the attack, whichever it is, is shown K logits in
    which that of y is max(z_y, z_rejected). :class:`Selective` alone is shown all K + 1.

    Arguments:
        attack: The attack.
    """

    attack: Attack
    paper = "wrapper: past a detector"

    @property
    def cost(self) -> int:
        """The attack's."""
        return self.attack.cost

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The attack's last iterate.

        Raises:
            UsageError: The goal is another, for which to be rejected would be a success.
        """
        _check_goal(oracle)
        return self.attack(_Merged(oracle), x, threat, rng)


class _Merged(Lens):
    """An oracle of K + 1 logits, seen as one of K."""

    k: int = 0

    def outputs(self, x_adv: Tensor, rows: Tensor | None = None, *, through: Through | None = None) -> Tensor:
        outputs = self.oracle.outputs(x_adv, rows, through=through)
        self.k = outputs.shape[1] - 1
        return merged(outputs, self._y if rows is None else self._y[rows])

    def loss(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> Tensor:
        return self.oracle.loss(x_adv, _on_merged(loss), rows, towards=towards, through=through)

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.oracle.grad(x_adv, _on_merged(loss), rows, towards=towards, through=through)

    def jacobian(self, x_adv: Tensor, towards: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is to be gained is what it would be without the detector, less what "rejected" has more than y."""
        if not self.k:
            self.outputs(x_adv, rows)
        rejected = torch.full_like(towards[:, :1], self.k)
        values, g = self.oracle.jacobian(x_adv, torch.cat([towards, rejected], 1), rows)
        above = values[:, -1:] > 0
        more = torch.where(above, values[:, -1:], 0)
        g_more = where(above.squeeze(1), g[:, -1], torch.zeros_like(g[:, -1])).unsqueeze(1)
        return values[:, :-1] - more, g[:, :-1] - g_more


def _on_merged(loss: Loss) -> Loss:
    return loss if loss is selective else lambda outputs, y, *towards: loss(merged(outputs, y), y, *towards)


def _check_goal(oracle: Oracle) -> None:
    if oracle.goal != UNNOTICED:
        raise UsageError(
            "the attack past a detector has another goal; it should be UNNOTICED, a wrong class that is not rejected"
        )


def selective(outputs: Tensor, y: Tensor) -> Tensor:
    """Max z - z_rejected where another of the K classes is before y; elsewhere -inf, with the gradient of the margin.

    So every wrong answer is worth more than a right one, and of two wrong ones that with the lower score.
    """
    z, rejected = outputs[:, :-1], outputs[:, -1]
    lead = margin(z, y)
    return torch.where(lead > 0, z.amax(1) - rejected, lead - math.inf)


@dataclass(frozen=True)
class Selective:
    r"""x_{t+1} = project(x_t + alpha_t * steepest(v)), v = mu * v + g / ||g||_1, on a :class:`Rejecting` model.

    Selective projected gradient descent: g is the gradient of the classifier's margin as long as its answer is right, and from
    there on that of the score alone. Bryniarski, Hingun, Pachuca, Wang and Carlini, 2021, "Evading adversarial example
    detection defenses with orthogonal projected gradient descent", https://arxiv.org/abs/2106.15023. To be run with the goal
    ``UNNOTICED``; the weight of the score does not matter.

    What is added: alpha falls to 0 along half a cosine, because long steps cross the plateaus of a score, on which a step that
    is chosen by how the loss rises is soon too short; and the momentum keeps the two gradients from undoing each other.

    Arguments:
        steps: How many gradients are taken.
    """

    steps: int = 100
    access = Access.GRADIENTS
    norms = (math.inf, 2.0, 1.0, 0.0)
    minimum = False
    paper = "Bryniarski et al. 2021"

    def __post_init__(self) -> None:
        check_whole("selective: steps", self.steps, 1)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The iterate of the least score among those that are answered wrongly, with shape (N, *).

        Raises:
            UsageError: The goal is another.
        """
        _check_goal(oracle)
        alpha = threat.width if threat.p == 0 else LONGEST * threat.eps
        k = max(1, round(L1_SHARE * x[0].numel()))
        x_t = best = threat.start(x, rng)
        v, f_best = torch.zeros_like(x), torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
        for t in range(self.steps):
            f, g = oracle.grad(x_t, selective)
            best, f_best = where(f > f_best, x_t, best), f_best.maximum(f)
            v = MU * v + g / per_row(lp_norm(g, 1).clamp(min=torch.finfo(g.dtype).tiny), g)
            fall = (1 + math.cos(math.pi * t / self.steps)) / 2
            x_t = threat.project(x_t + fall * alpha * threat.steepest(v, k), x)
        return best
