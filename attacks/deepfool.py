"""DeepFool: from one hyperplane to the next.

Symbols: x_t is the iterate, k a class other than the label y, f_k = z_k - z_y what is gained towards k (negative until the
boundary is crossed), w_k its gradient, q the dual of p, eta the overshoot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.norms import dual, lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

LEAST = 0.1
"""The overshoot of a step is at least this share of eta times the way from x, so that steps that shrink to nothing cross."""


@dataclass(frozen=True)
class DeepFool:
    r"""x_{t+1} = x_t + (1 + eta) * |f_k| / ||w_k||_q * v, v the steepest direction of w_k.

    k is the class with the least |f_k| / ||w_k||_q: the step is one to the closest of the hyperplanes
    f_k + <w_k, z - x_t> = 0. A row ends where it first crosses. With a
    target there is one boundary to cross, that of the greatest other logit (the paper has no targets).

    Two changes: the overshoot is at least a tenth of eta of the whole way ||x_t - x||_p, as that of a step alone vanishes with
    the step, and where clipping undoes part of each step a row would stop short of the boundary for ever. And at the end the
    last step is halved ``halvings`` times, which finds where on it the boundary is.

    Moosavi-Dezfooli, Fawzi and Frossard, 2016, "DeepFool: a simple and accurate method to fool deep neural networks",
    https://arxiv.org/abs/1511.04599.

    Arguments:
        steps: The most steps that a row takes.
        classes: How many classes are looked at: the label, and the others with the greatest logits.
        overshoot: eta.
        halvings: How many forward passes the end of a row takes; 0 for the paper's.
    """

    steps: int = 50
    classes: int = 10
    overshoot: float = 0.02
    halvings: int = 5
    access = Access.GRADIENTS
    norms = (math.inf, 2.0)
    minimum = True
    paper = "Moosavi-Dezfooli et al. 2016"

    def __post_init__(self) -> None:
        check_whole("deepfool: steps", self.steps, 1)
        check_whole("deepfool: classes", self.classes, 2)
        check_positive("deepfool: overshoot", self.overshoot)
        check_whole("deepfool: halvings", self.halvings, 0)

    @property
    def cost(self) -> int:
        """A look at the classes; a forward pass and a backward pass a class, a step; the halvings."""
        return 1 + self.steps * self.classes + self.halvings

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        rivals = None if oracle.goal.targeted else oracle.rivals(oracle.outputs(x), self.classes - 1)
        x_t, inside, rows = x.clone(), x.clone(), oracle.live
        for _ in range(self.steps):
            f, w = _boundaries(oracle, x_t[rows], rivals, rows)
            here = ((f <= 0) & f.isfinite()).all(1)
            rows, f, w = rows[here], f[here], w[here]
            if not len(rows):
                break
            z = x_t[rows]
            far, w_k = _closest(f, w, threat.p)
            step = far + self.overshoot * torch.maximum(far, LEAST * lp_norm(z - x[rows], threat.p))
            inside[rows] = z
            x_t[rows] = (z + per_row(step, z) * threat.steepest(w_k)).clamp(threat.low, threat.high)
        return self._halved(oracle, inside, x_t)

    def _halved(self, oracle: Oracle, inside: Tensor, x_t: Tensor) -> Tensor:
        """A point closer to the boundary between one ``inside`` and one that may have crossed it."""
        for _ in range(self.halvings):
            rows = oracle.live
            middle = (inside[rows] + x_t[rows]) / 2
            fooled = oracle.fooled(middle, rows)
            x_t[rows[fooled]], inside[rows[~fooled]] = middle[fooled], middle[~fooled]
        return x_t


def _boundaries(oracle: Oracle, z: Tensor, rivals: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each f_k, (M, C), and w_k, (M, C, *); for a target the one of the greatest other logit."""
    if rivals is not None:
        return oracle.jacobian(z, rivals[rows], rows)
    f, w = oracle.grad(z, margin, rows)
    return f.unsqueeze(1), w.unsqueeze(1)


def _closest(f: Tensor, w: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The distance to the closest hyperplane, 0 where none can be reached, (M,), and its w_k, (M, *)."""
    slope = lp_norm(w.flatten(0, 1), dual(p)).view_as(f)
    far, k = torch.where(slope > 0, f.abs() / slope, math.inf).min(1)
    return torch.where(far < math.inf, far, 0.0), w[torch.arange(len(w), device=w.device), k]
