"""Geometry of the l_p balls around zero, per example.

Every function takes a batch-first tensor ``d`` of shape (N, *) and treats each row as one vector. ``p`` is 0, 1, 2 or inf;
l_0 counts the entries that are not zero. Radii are a number or a tensor of shape (N,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advkit.errors import UsageError

NORMS = (0.0, 1.0, 2.0, math.inf)


def norm_name(p: float) -> str:
    """The name of a norm: ``l_inf``, ``l_2``.

    >>> norm_name(math.inf), norm_name(2)
    ('l_inf', 'l_2')
    """
    return "l_inf" if p == math.inf else f"l_{p:g}"


def check_norm(p: float) -> float:
    """``p`` as a float, or a sentence saying which norms there are."""
    if p not in NORMS:
        raise UsageError(f"p is {p!r}; the norms are 0, 1, 2 and inf")
    return float(p)


def dual(p: float) -> float:
    """The q of the dual norm: 1/p + 1/q = 1. For p = 0 it is 1, as steps are bounded entry by entry."""
    return {0.0: 1.0, 1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[p]


def per_row(value: float | Tensor, d: Tensor) -> float | Tensor:
    """``value`` in a shape that broadcasts against ``d``: a number stays one, (N,) becomes (N, 1, ...)."""
    return value.view(-1, *(1,) * (d.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value


def where(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` in the rows that a mask, (N,), says and ``b`` in the others, with shape (N, *)."""
    return torch.where(rows.view(-1, *(1,) * (a.ndim - 1)), a, b)


def lp_norm(d: Tensor, p: float) -> Tensor:
    """The l_p norm of each row, with shape (N,)."""
    flat = d.flatten(1)
    if p == 0:
        return (flat != 0).sum(1).to(d.dtype)
    if p == math.inf:
        return flat.abs().amax(1)
    return torch.linalg.vector_norm(flat, p, dim=1)


def project(d: Tensor, p: float, eps: float | Tensor) -> Tensor:
    r"""The closest point of the ball: argmin over z of ||z - d||_2 subject to ||z||_p <= eps, for each row.

    For l_1 this is the soft threshold found by sorting (Duchi, Shalev-Shwartz, Singer and Chandra, 2008, "Efficient
    projections onto the l1-ball for learning in high dimensions", https://doi.org/10.1145/1390156.1390191); for l_0 the eps
    largest entries stay, the first ones where several are equal.

    >>> project(torch.tensor([[3.0, -4.0]]), 2, 1.0)
    tensor([[ 0.6000, -0.8000]])
    >>> project(torch.tensor([[3.0, -4.0]]), 1, 3.0)
    tensor([[ 1., -2.]])
    """
    if p == math.inf:
        return d.clamp(-eps, eps) if not isinstance(eps, Tensor) else _clamp_rows(d, eps)
    if p == 2:
        radius = per_row(eps, d)
        norm = per_row(lp_norm(d, 2), d)
        return d * (radius / norm).clamp(max=1.0).nan_to_num(1.0)  # type: ignore[union-attr]
    return project_l1_box(d, eps, torch.full_like(d, math.inf)) if p == 1 else _project_l0(d, eps)


def _clamp_rows(d: Tensor, eps: Tensor) -> Tensor:
    radius = per_row(eps, d)
    assert isinstance(radius, Tensor)
    return torch.minimum(torch.maximum(d, -radius), radius)


def _radii(d: Tensor, eps: float | Tensor) -> Tensor:
    return torch.as_tensor(eps, dtype=d.dtype, device=d.device).expand(len(d)).unsqueeze(1)


def project_l1_box(d: Tensor, eps: float | Tensor, room: Tensor) -> Tensor:
    r"""The closest point of the l_1 ball with |z_i| <= room_i as well: sign(d) * min(max(|d| - theta, 0), room), for each row.

    ``room`` has the shape of d and is how far each entry may go in the direction of d. Sum_i min(max(|d_i| - theta, 0), room_i)
    falls in theta, linearly between the points |d_i| - room_i and |d_i|; theta is where it is eps (Croce and Hein, 2021,
    https://arxiv.org/abs/2103.01208).

    >>> project_l1_box(torch.tensor([[3.0, -4.0]]), 3.0, torch.tensor([[5.0, 0.5]]))
    tensor([[ 2.5000, -0.5000]])
    """
    size = d.abs()
    z = torch.minimum(size, room)
    over = (z.flatten(1).double().sum(1) > _radii(d, eps).squeeze(1)).nonzero().squeeze(1)
    if len(over):
        u, most = size[over].flatten(1).double(), room[over].flatten(1).double()
        theta = _threshold(u, most, _radii(d, eps)[over].double())
        z[over] = torch.minimum((u - theta).clamp(min=0.0), most).to(d.dtype).view_as(z[over])
    return d.sign() * z


def _threshold(u: Tensor, most: Tensor, radius: Tensor) -> Tensor:
    """The theta at which min(max(u - theta, 0), most) sums to the radius, with shape (N, 1), where theta = 0 exceeds it."""
    begin = (u - most).clamp(min=0.0)
    points, order = torch.cat([begin, u], 1).sort(1)
    # From where an entry begins to shrink to where it is gone, the sum falls by one a unit of theta.
    slope = torch.where(order < u.shape[1], -1.0, 1.0).double().cumsum(1)
    first = torch.minimum(u, most).sum(1, keepdim=True)
    falls = slope[:, :-1] * points.diff(dim=1)
    sums = torch.cat([first, first + falls.cumsum(1)], 1)
    i = (sums > radius).sum(1, keepdim=True).clamp(1, points.shape[1]) - 1
    return points.gather(1, i) + (sums.gather(1, i) - radius) / (-slope.gather(1, i)).clamp(min=1.0)


def _project_l0(d: Tensor, eps: float | Tensor) -> Tensor:
    flat = d.flatten(1)
    rank = torch.empty_like(flat, dtype=torch.int64)
    order = flat.abs().argsort(dim=1, descending=True, stable=True)
    rank.scatter_(1, order, torch.arange(flat.shape[1], device=d.device).expand_as(order))
    return torch.where(rank < _radii(d, eps).floor(), flat, torch.zeros_like(flat)).view_as(d)


def steepest(g: Tensor, p: float, k: int = 1) -> Tensor:
    """The direction in which ``g`` grows fastest: argmax over v of <g, v> subject to ||v||_p <= 1, for each row.

    It attains the dual norm, <g, v> = ||g||_q. For l_1 that is one entry, the first where several tie; with k > 1 the k
    largest share the unit equally, which makes better progress over several steps (Tramer and Boneh, 2019,
    https://arxiv.org/abs/1904.13000). The l_0 ball has no such direction (it is a cone); there v = g / max|g|, and the
    ball's own projection decides which entries stay (Croce and Hein, 2019, https://arxiv.org/abs/1909.05040). A zero row
    stays zero.

    >>> steepest(torch.tensor([[3.0, -4.0]]), 2)
    tensor([[ 0.6000, -0.8000]])
    >>> steepest(torch.tensor([[3.0, -4.0]]), 1)
    tensor([[ 0., -1.]])
    """
    if p == math.inf:
        return g.sign()
    if p == 1:
        flat = g.flatten(1)
        # argmax and topk may break ties differently from one device or batch to another; a stable sort does not.
        i = flat.abs().argsort(dim=1, descending=True, stable=True)[:, :k] if k > 1 else flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, i, flat.gather(1, i).sign() / i.shape[1]).view_as(g)
    # First to a greatest entry of 1: the squares of very large or very small gradients would not fit the type.
    v = _scaled(g, math.inf)
    return _scaled(v, 2) if p == 2 else v


def _scaled(d: Tensor, p: float) -> Tensor:
    """Each row divided by its norm; a zero row stays zero."""
    norm = lp_norm(d, p)
    return d / per_row(torch.where(norm > 0, norm, torch.ones_like(norm)), d)
