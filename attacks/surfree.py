"""SurFree: circles instead of gradients.

Symbols: x_t is the iterate, which meets the goal; d its distance from x, u the unit direction from x to it; v is a random unit
direction at a right angle to u, alpha an angle, theta the one that is tried first. M is the number of rows at work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.norms import lp_norm, per_row, steepest
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.starts import Meter, begin
from advkit.streams import Streams
from advkit.threat import Lp

HALVINGS = 10
"""How often the way from x to the first input is halved."""
THETA, RHO = 0.5, 0.9
"""The first theta; it shrinks by RHO where no angle meets the goal and grows by 1 / RHO where one does."""
WIDER = 1.5
"""The greater angle that is tried after one that meets the goal, as a multiple of it."""


@dataclass(frozen=True)
class SurFree:
    r"""z(alpha) = x + d * cos(alpha) * (cos(alpha) * u + sin(alpha) * v) is kept for the greatest alpha found to meet the goal.

    The points z(alpha) are on the circle of diameter d through x and x_t, in the plane of u and v, so each is closer than x_t.
    Where the boundary is flat, the best of the circle is the closest point of the boundary in that plane. theta is tried on
    both sides, and then a greater angle; the paper searches finer. v is smooth, a sum of
    cosines of low frequency along the last axes (one, or the two of an image), as boundaries of networks for images mostly
    bend that way. Every other v has all frequencies, which the paper does not have: without it a boundary whose normal is
    rough is never reached. The paper also keeps each v at right angles to those before; in high dimension random ones nearly
    are.

    Maho, Furon and Le Merrer, 2021, "SurFree: a fast surrogate-free black-box attack", https://arxiv.org/abs/2011.12807.

    Arguments:
        queries: How many forward passes are made.
        share: The share of the frequencies of each axis, lowest first, that a smooth v has.
    """

    queries: int = 5000
    share: float = 0.5
    access = Access.LABELS
    norms = (2.0,)
    minimum = True
    paper = "Maho et al. 2021"

    def __post_init__(self) -> None:
        check_whole("surfree: queries", self.queries, 1)
        check_positive("surfree: share", self.share)

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        meter = Meter(oracle, x, self.queries)
        x_t = begin(meter, x, threat, rng, HALVINGS)
        theta = torch.full((len(x),), THETA, dtype=x.dtype, device=x.device)
        smooth = True
        while len(rows := meter.live):
            v = _direction(self.share if smooth else 1.0, x, rows, rng)
            circle = Circle.through(x[rows], x_t[rows], v)
            alpha = _first_angle(meter, circle, theta[rows], rows, threat)
            good = alpha != 0
            theta[rows] = torch.where(good, theta[rows] / RHO, theta[rows] * RHO).clamp(max=math.pi / 4)
            x_t[rows[good]] = _widest(meter, circle.part(good), alpha[good], rows[good], threat)
            smooth = not smooth
        return x_t


@dataclass(frozen=True)
class Circle:
    """The circles of M rows; x, u and v have shape (M, *), d has shape (M,)."""

    x: Tensor
    u: Tensor
    v: Tensor
    d: Tensor

    @classmethod
    def through(cls, x: Tensor, x_t: Tensor, v: Tensor) -> Circle:
        """The circles with the diameters x to x_t, in the planes of these and v."""
        u = steepest(x_t - x, 2)
        return cls(x, u, steepest(v - per_row((v * u).flatten(1).sum(1), v) * u, 2), lp_norm(x_t - x, 2))

    def part(self, which: Tensor) -> Circle:
        """Some of them."""
        return Circle(self.x[which], self.u[which], self.v[which], self.d[which])

    def at(self, alpha: Tensor, threat: Lp) -> Tensor:
        """z(alpha), (M, *), in the range."""
        chord = self.d * alpha.cos()
        along, across = per_row(chord * alpha.cos(), self.x), per_row(chord * alpha.sin(), self.x)
        return (self.x + along * self.u + across * self.v).clamp(threat.low, threat.high)


def _first_angle(meter: Meter, circle: Circle, theta: Tensor, rows: Tensor, threat: Lp) -> Tensor:
    """The one of theta and -theta that meets the goal first, and 0 where neither does, (M,)."""
    alpha = torch.zeros_like(theta)
    for sign in (1.0, -1.0):
        open_ = ((alpha == 0) & (meter.left[rows] > 0)).nonzero().squeeze(1)
        if not len(open_):
            break
        tried = sign * theta[open_]
        met = meter.fooled(circle.part(open_).at(tried, threat), rows[open_])
        alpha[open_[met]] = tried[met]
    return alpha


def _widest(meter: Meter, circle: Circle, alpha: Tensor, rows: Tensor, threat: Lp) -> Tensor:
    """The point at WIDER * alpha where it meets the goal, and at alpha, which does, where not, (M, *)."""
    z, wider = circle.at(alpha, threat), circle.at(WIDER * alpha, threat)
    met = meter.fooled(wider, rows)
    z[met] = wider[met]
    return z


def _direction(share: float, x: Tensor, rows: Tensor, rng: Streams) -> Tensor:
    """A random direction for each row, (M, *): Gaussian in the lowest frequencies of the last axis, or of an image's two."""
    shape = x.shape[1:]
    axes = 1 if len(shape) < 3 else 2
    if share >= 1:
        return rng.normal(*shape, rows=rows, dtype=x.dtype)
    kept = [math.ceil(share * n) for n in shape[-axes:]]
    v = rng.normal(*shape[:-axes], *kept, rows=rows, dtype=x.dtype)
    for axis in range(-axes, 0):
        n = shape[axis]
        i = torch.arange(n, dtype=x.dtype, device=x.device).unsqueeze(1)
        waves = torch.cos(math.pi / n * (i + 0.5) * torch.arange(v.shape[axis], dtype=x.dtype, device=x.device))
        v = (v.movedim(axis, -1) @ waves.T).movedim(-1, axis)
    return v
