"""Exhaustive search over a grid.

Symbols: d is the number of entries of an input, k how many values of each are tried, u a point of the grid in [-1, 1]^d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.errors import UsageError
from advkit.oracle import Access, Oracle
from advkit.spec import check_whole
from advkit.streams import Streams
from advkit.threat import Lp


@dataclass(frozen=True)
class Grid:
    """All k^d points x + eps * u, where u has the same k values from -1 to 1 in each entry; the farthest first.

    Engstrom, Tran, Tsipras, Schmidt and Madry, 2019, "Exploring the landscape of spatial robustness",
    https://arxiv.org/abs/1712.02779. It is for the few numbers of a rotation or of colours: as a function of them a loss has
    many maxima, in which gradients are caught. The paper tries 31 angles and 5 by 5 shifts, 775 points.

    Arguments:
        n: The most points; k is the greatest number with k^d <= n, and an input with so many entries that k is less than 3
            is refused.

    Raises:
        UsageError: n is less than 3.
    """

    n: int = 775
    access = Access.LABELS
    norms = (math.inf,)
    minimum = False
    paper = "Engstrom et al. 2019"

    def __post_init__(self) -> None:
        check_whole("grid: n", self.n, 3)

    @property
    def cost(self) -> int:
        """A forward pass a point."""
        return self.n

    @property
    def dimensions(self) -> int:
        """The most entries that an input may have: those with 3 values of each."""
        return max(d for d in range(1, 34) if 3**d <= self.n)

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last point, with shape (N, *)."""
        x_adv = x
        for u in self._points(x[0].numel()).to(x):
            x_adv = threat.project(x + threat.eps * u.view(x.shape[1:]), x)
            oracle.fooled(x_adv)
        return x_adv

    def _points(self, d: int) -> Tensor:
        """The grid, with shape (k^d, d)."""
        if d > self.dimensions:
            raise UsageError(
                f"grid: {d} numbers are to be searched; with n = {self.n} points it can be at most {self.dimensions}"
            )
        # The root of 9^3 is 8.999... in floats.
        k = int(self.n ** (1 / d) + 1e-9)
        values = torch.linspace(-1.0, 1.0, k, dtype=torch.float64)
        u = torch.cartesian_prod(*[values] * d).view(-1, d)
        return u[u.abs().sum(1).argsort(descending=True, stable=True)]
