"""The l_p balls.

Symbols: x is an input, z an allowed one, p the norm, eps the radius.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit import norms
from advkit.errors import UsageError
from advkit.streams import Streams


@dataclass(frozen=True)
class Lp:
    r"""All inputs z in [low, high] with ||z - x||_p <= eps.

    Arguments:
        p: The norm: 0 (how many entries change), 1, 2 or inf.
        eps: The radius, in the units of the data (8/255 for a pixel in [0, 1]); inf asks for the closest example.
        low: The least value the data may have; -inf where there is none.
        high: The greatest.

    Raises:
        UsageError: A norm that is not 0, 1, 2 or inf, a radius that is not positive, or an empty range.

    >>> Lp(math.inf, 8 / 255).allows(torch.tensor([[0.52]]), torch.tensor([[0.5]]))
    tensor([True])
    """

    p: float
    eps: float = math.inf
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        norms.check_norm(self.p)
        if not self.eps > 0:
            raise UsageError(f"eps is {self.eps}; a radius is greater than 0 (leave it out to search for the closest example)")
        if self.p == 0 and self.eps < 1:
            raise UsageError(f"eps is {self.eps}; in l_0 it is how many entries may change, at least 1")
        if not self.low < self.high:
            raise UsageError(f"the range [{self.low}, {self.high}] is empty; low must be less than high")

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """||x_adv - x||_p, with shape (N,), summed in float64."""
        return norms.lp_norm(x_adv.double() - x.double(), self.p).to(x.dtype)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """``x_adv`` moved into the ball, then into the range.

        As x is in the range, clipping only brings entries closer to x and never leaves the ball. For l_inf and l_1
        this is the closest allowed point; for l_2 it is an allowed point close to it. l_0 clips first: which entries stay is
        decided by what each is worth after clipping.
        """
        if self.eps == math.inf:
            return x_adv.clamp(self.low, self.high)
        if self.p == math.inf:
            return torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp_(self.low, self.high)
        if self.p == 1:
            d = x_adv - x
            return (x + norms.project_l1_box(d, self.eps, torch.where(d > 0, self.high - x, x - self.low))).clamp_(
                self.low, self.high
            )
        if self.p == 0:
            clipped = x_adv.clamp(self.low, self.high)
            return torch.where(norms.project(clipped - x, 0, math.floor(self.eps)) != 0, clipped, x)
        return (x + norms.project(x_adv - x, self.p, self.eps)).clamp_(self.low, self.high)

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which rows are finite, in the range and in the ball, up to the rounding of x + d to the data's type; shape (N,)."""
        flat = x_adv.flatten(1)
        inside = ((flat >= self.low) & (flat <= self.high) & flat.isfinite()).all(1)
        d = x_adv.double() - x.double()
        return inside & (norms.lp_norm(d, self.p) <= self.eps + self._slack(x, d))

    def _slack(self, x: Tensor, d: Tensor) -> Tensor | float:
        """What rounding the entries of x + d that changed, by half a unit in the last place each, can add to ||d||_p."""
        if self.p == 0 or self.eps == math.inf:
            return 0.0
        half = torch.finfo(x.dtype).eps / 2 * (x.double().abs() + d.abs())
        # One more part in 10^6 of the radius, for the rounding of norms and factors.
        return norms.lp_norm(torch.where(d != 0, half, 0.0), self.p) + 1e-6 * self.eps

    def snap(self, x_adv: Tensor, x: Tensor, levels: int, outward: bool = False) -> Tensor:
        """``x_adv`` on the grid of ``levels`` equal steps from low to high, inside the ball, with shape (N, *).

        Each entry goes to the nearest grid value, or with ``outward`` to the next one away from x; one that left the ball by
        that (in l_inf), and every entry of a row that did (in the other norms), goes to the next grid value towards x.
        """
        step = self.width / levels
        grid, origin = (x_adv - self.low) / step, (x - self.low) / step
        # What is on the grid up to rounding stays there.
        towards = torch.where(grid > origin, (grid + 1e-3).floor(), (grid - 1e-3).ceil()).clamp(0, levels)
        away = torch.where(grid > origin, (grid - 1e-3).ceil(), (grid + 1e-3).floor()).clamp(0, levels)
        wanted = away if outward else grid.round().clamp(0, levels)
        # In this order, because reading the saved file computes it so.
        z, safe = (v / levels * self.width + self.low for v in (wanted, towards))
        fits = (z - x).abs() <= self.eps + 1e-3 * step if self.p == math.inf else norms.per_row(self.allows(z, x), x)
        return torch.where(torch.as_tensor(fits), z, safe).clamp(self.low, self.high)

    def steepest(self, g: Tensor, k: int = 1) -> Tensor:
        """The direction of unit length in which ``g`` grows fastest, with shape (N, *); in l_1, shared by k entries."""
        return norms.steepest(g, self.p, k)

    def start(self, x: Tensor, rng: Streams) -> Tensor:
        """Uniform in the ball, then projected into the range; uniform in the range where eps is inf."""
        shape = x.shape[1:]
        if self.eps == math.inf:
            return self.low + self.width * rng.uniform(*shape, dtype=x.dtype)
        if self.p == 0:
            return self._start_l0(x, rng)
        return self.project(x + self.eps * _uniform_in_ball(shape, self.p, rng, x.dtype), x)

    def _start_l0(self, x: Tensor, rng: Streams) -> Tensor:
        """Eps entries, chosen at random, with values uniform in the range."""
        order = rng.uniform(x[0].numel(), dtype=torch.float64).argsort(1)
        chosen = torch.zeros_like(order).scatter_(1, order[:, : int(self.eps)], 1).bool().view(x.shape)
        return torch.where(chosen, self.low + self.width * rng.uniform(*x.shape[1:], dtype=x.dtype), x)

    @property
    def width(self) -> float:
        """High - low.

        Raises:
            UsageError: The range is not finite.
        """
        width = self.high - self.low
        if width == math.inf:
            raise UsageError("this needs a finite range of the data; give the threat model low and high")
        return width


def _uniform_in_ball(shape: torch.Size, p: float, rng: Streams, dtype: torch.dtype) -> Tensor:
    """Uniform in the unit ball of l_1, l_2 or l_inf (Barthe, Guedon, Mendelson and Naor, 2005), with shape (N, *shape)."""
    if p == math.inf:
        return 2.0 * rng.uniform(*shape, dtype=dtype) - 1.0
    if p == 2:
        d = rng.normal(*shape, dtype=dtype)
    else:
        sign = torch.where(rng.uniform(*shape, dtype=dtype) < 0.5, -1.0, 1.0).to(dtype)
        d = -sign * torch.log1p(-rng.uniform(*shape, dtype=dtype))
    size = math.prod(shape)
    radius = rng.uniform(dtype=torch.float64).pow(1.0 / size).to(dtype)
    return d * norms.per_row(radius / norms.lp_norm(d, p), d)
