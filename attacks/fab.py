"""FAB: projections on the boundary's hyperplane inside the range, biased towards the clean input.

Symbols: x_t is the iterate, f and w what is gained towards the class of the closest hyperplane and its gradient, d_t and d_0
the steps from x_t and from x onto {z: f + <w, z - x_t> = 0}, alpha how much of the second is taken, eta the overshoot, beta how
far a success is moved back towards x, q the dual of p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.norms import dual, lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_whole
from advkit.streams import Streams
from advkit.threat import Lp

ALPHA, BETA, ETA = 0.1, 0.9, 1.05
"""The most of alpha, beta and eta: the paper's."""


@dataclass(frozen=True)
class FAB:
    r"""x_{t+1} = (1 - alpha) * (x_t + eta * d_t) + alpha * (x + eta * d_0), clipped.

    alpha = min(||d_t||_p / (||d_t||_p + ||d_0||_p), 0.1), and d_t and d_0 are exact projections in the l_p norm onto the
    hyperplane inside the range. A success is moved back to x + beta * (x_{t+1} - x). Of several classes, the one with the least
    |f| / ||w||_q is taken. With a target of the adversary's there is one, that of the greatest other logit.

    Croce and Hein, 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
    https://arxiv.org/abs/1907.02044.

    Arguments:
        steps: How many steps are taken.
        targets: How many classes, those with the greatest logits first, are tried one after the other, ``steps`` steps each,
            as in AutoAttack; 0 to look at all of them in each step.
        classes: How many classes are looked at with ``targets=0``: the label, and the others with the greatest logits.
    """

    steps: int = 100
    targets: int = 0
    classes: int = 10
    access = Access.GRADIENTS
    norms = (math.inf, 2.0, 1.0)
    minimum = True
    paper = "Croce and Hein 2020"

    def __post_init__(self) -> None:
        check_whole("fab: steps", self.steps, 1)
        check_whole("fab: targets", self.targets, 0)
        check_whole("fab: classes", self.classes, 2)

    @property
    def cost(self) -> int:
        """A look at the classes; two forward passes and a backward pass a class, a step."""
        return 1 + self.steps * (3 * self.targets if self.targets else self.classes + 1)

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        if oracle.goal.targeted:
            return self._search(oracle, x, threat, None)
        rivals = oracle.rivals(oracle.outputs(x), self.targets or self.classes - 1)
        x_t = x
        for towards in rivals.split(1 if self.targets else rivals.shape[1], dim=1):
            x_t = self._search(oracle, x, threat, towards)
        return x_t

    def _search(self, oracle: Oracle, x: Tensor, threat: Lp, towards: Tensor | None) -> Tensor:
        """The search near the hyperplanes of some classes, (N, C), from x."""
        x_t = x.clone()
        for _ in range(self.steps):
            rows = oracle.live
            z, x_0 = x_t[rows], x[rows]
            f, w = _hyperplane(oracle, z, towards, rows, threat.p)
            to_x = ((x_0 - z) * w).flatten(1).sum(1)
            d = onto_hyperplane(torch.stack([z, x_0], 1), w.unsqueeze(1), torch.stack([-f, -f - to_x], 1), threat)
            d_t, d_0 = d.unbind(1)
            size_t, size_0 = lp_norm(d_t, threat.p), lp_norm(d_0, threat.p)
            alpha = (size_t / (size_t + size_0).clamp(min=torch.finfo(x.dtype).tiny)).clamp(max=ALPHA)
            z = torch.lerp(z + ETA * d_t, x_0 + ETA * d_0, per_row(alpha, z)).clamp(threat.low, threat.high)
            back = torch.where(oracle.fooled(z, rows), BETA, 1.0).to(x.dtype)
            x_t[rows] = torch.lerp(x_0, z, per_row(back, z))
        return x_t


def _hyperplane(oracle: Oracle, z: Tensor, towards: Tensor | None, rows: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """f, (M,), and w, (M, *), of the closest hyperplane; where ``towards`` is None, of the greatest other logit."""
    if towards is None:
        return oracle.grad(z, margin, rows)
    f, w = oracle.jacobian(z, towards[rows], rows)
    slope = lp_norm(w.flatten(0, 1), dual(p)).view_as(f)
    k = torch.where(slope > 0, f.abs() / slope, math.inf).argmin(1)
    row = torch.arange(len(z), device=z.device)
    return f[row, k], w[row, k]


def onto_hyperplane(z: Tensor, w: Tensor, gap: Tensor, threat: Lp) -> Tensor:
    """The least step in the range that makes up a gap: argmin over d of ||d||_p s.t. <w, d> = gap and low <= z + d <= high.

    Where the range is too small for that, d goes as far as it can. Several points may share one hyperplane.

    Arguments:
        z: The points, with shape (M, P, *).
        w: The normals, with shape (M, 1, *).
        gap: What <w, d> is to be, with shape (M, P).
        threat: The norm and the range.
    """
    shape, (z, w) = z.shape, (z.flatten(2), w.flatten(2))
    up = (w > 0) == (gap >= 0).unsqueeze(2)
    room = torch.where(up, threat.high - z, z - threat.low)
    # What remains to be found is how far to go, 0 <= t <= room, with sum |w| * t = |gap|.
    a, c = w.abs(), gap.abs().unsqueeze(2)
    if threat.p == 1:
        t = _largest_first(a, room, c)
    else:
        u = a if threat.p == 2 else a.sign()
        t = torch.minimum(_level(a, u, room, c) * u, room)
    return torch.where(a > 0, torch.where(up, t, -t), 0.0).view(shape)


def _level(a: Tensor, u: Tensor, room: Tensor, c: Tensor) -> Tensor:
    """The level at which sum a * min(level * u, room) = c, inf where it never is; (M, P, 1).

    The sum is concave in the level, so Newton's steps from below end at the level itself, without sorting.
    """
    au = a * u
    level = c / au.sum(2, keepdim=True)
    for _ in range(a.shape[2]):
        full = level * u >= room
        left = c - torch.where(full, a * room, 0.0).sum(2, keepdim=True)
        slope = torch.where(full, 0.0, au).sum(2, keepdim=True)
        more = torch.where(slope > 0, left / slope, torch.where(left > 0, math.inf, level))
        rises = more > level
        if not bool(rises.any()):
            break
        level = torch.where(rises, more, level)
    return level


def _largest_first(a: Tensor, room: Tensor, c: Tensor) -> Tensor:
    """How far each entry goes if those with the largest a go first, each as far as it can: optimal in l_1; (M, P, D)."""
    a, order = a.sort(dim=2, descending=True, stable=True)
    order = order.expand_as(room)
    room = room.gather(2, order)
    gained = torch.where(a > 0, a * room, 0.0).cumsum(2)
    before = torch.cat([torch.zeros_like(c), gained[:, :, :-1]], 2)
    t = ((c - before) / a).clamp(min=0.0)
    return torch.empty_like(t).scatter_(2, order, torch.minimum(t, room))
