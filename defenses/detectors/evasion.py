"""A classifier that may reject its input, and attacks that get a wrong answer out of it.

Symbols: z are the logits of the K classes, s(x) the score of the detector, t its threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.combine import Lens, Wrapper
from advkit.engine import Attack
from advkit.losses import Loss, towards_margin
from advkit.oracle import Goal, Oracle, Through, logits_of
from advkit.streams import Streams
from advkit.threat import Lp


class Rejecting(nn.Module):
    r"""K + 1 logits: those of the classifier, and max_k z_k + scale * (s(x) - t), which is the greatest where s(x) > t.

    After Carlini and Wagner, 2017, "Adversarial examples are not easily detected: bypassing ten detection methods",
    https://arxiv.org/abs/1705.07263, who multiply where this adds, so that it holds for logits of either sign.

    Arguments:
        model: Inputs (N, *) to logits (N, K).
        detector: Inputs to scores, with shape (N,).
        threshold: t.
        scale: Logits a unit of the score; whatever it is, the answer is the same.
    """

    def __init__(self, model: Callable[[Tensor], object], detector: nn.Module, threshold: float, scale: float = 1.0) -> None:
        super().__init__()
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
    which that of y is max(z_y, z_rejected). Where the wrong class leads and the input is rejected, the gradient of a margin is
    then that of the score alone; where the right class leads and it is not, that of the classifier alone, as in the selective
    gradients of Bryniarski, Hingun, Pachuca, Wang and Carlini, 2021, "Evading adversarial example detection defenses with
    orthogonal projected gradient descent", https://arxiv.org/abs/2106.15023.

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
        """The attack's last iterate."""
        return self.attack(_Merged(oracle), x, threat, rng)


class _Merged(Lens):
    """An oracle of K + 1 logits, seen as one of K."""

    def outputs(self, x_adv: Tensor, rows: Tensor | None = None, *, through: Through | None = None) -> Tensor:
        outputs = self.oracle.outputs(x_adv, rows, through=through)
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
        parts = [self.grad(x_adv, towards_margin, rows, towards=t) for t in towards.unbind(1)]
        values, g = zip(*parts, strict=True)
        return torch.stack(values, 1), torch.stack(g, 1)


def _on_merged(loss: Loss) -> Loss:
    return lambda outputs, y, *towards: loss(merged(outputs, y), y, *towards)
