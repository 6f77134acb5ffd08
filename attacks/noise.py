"""Noise, as a baseline: what an attack must beat, and how much of a model's error needs no adversary.

Each draws n random inputs of the same radius and keeps the first that fools the model; it needs labels only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_whole
from advkit.streams import Streams
from advkit.threat import Lp


def _best_of(n: int, oracle: Oracle, x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    x_adv = x
    for _ in range(n):
        x_adv = draw()
        oracle.fooled(x_adv)
    return x_adv


@dataclass(frozen=True)
class Uniform:
    """n inputs uniform in the ball, projected into the threat model.

    Arguments:
        n: How many are tried.
    """

    n: int = 100
    access = Access.LABELS
    norms = (math.inf, 2.0, 1.0, 0.0)
    minimum = False
    paper = "baseline"

    def __post_init__(self) -> None:
        check_whole("uniform: n", self.n, 1)

    @property
    def cost(self) -> int:
        """A forward pass a try."""
        return self.n

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last input tried, with shape (N, *)."""
        return _best_of(self.n, oracle, x, lambda: threat.start(x, rng))


@dataclass(frozen=True)
class Gaussian:
    """n inputs x + d, d a Gaussian direction as long as the ball allows, projected into the threat model.

    Arguments:
        n: How many are tried.
    """

    n: int = 100
    access = Access.LABELS
    norms = (math.inf, 2.0, 1.0)
    minimum = False
    paper = "baseline"

    def __post_init__(self) -> None:
        check_whole("gaussian: n", self.n, 1)

    @property
    def cost(self) -> int:
        """A forward pass a try."""
        return self.n

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last input tried, with shape (N, *)."""

        def draw() -> Tensor:
            d = rng.normal(*x.shape[1:], dtype=x.dtype)
            # In l_inf a Gaussian scaled to its largest entry hardly moves the rest; eps is its deviation there instead.
            length = 1.0 if threat.p == math.inf else per_row(lp_norm(d, threat.p), d)
            return threat.project(x + threat.eps * d / length, x)

        return _best_of(self.n, oracle, x, draw)


@dataclass(frozen=True)
class SaltAndPepper:
    """n inputs in which a random share of the entries is set to the least or the greatest value, projected into the ball.

    Arguments:
        n: How many are tried; the share grows evenly from 1/n to 1.
    """

    n: int = 100
    access = Access.LABELS
    norms = (math.inf, 2.0, 1.0, 0.0)
    minimum = False
    paper = "baseline"

    def __post_init__(self) -> None:
        check_whole("salt-and-pepper: n", self.n, 1)

    @property
    def cost(self) -> int:
        """A forward pass a try."""
        return self.n

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last input tried, with shape (N, *)."""
        low, width = threat.low, threat.width
        shares = iter(range(1, self.n + 1))

        def draw() -> Tensor:
            share = next(shares) / self.n
            u = rng.uniform(*x.shape[1:], dtype=x.dtype)
            extreme = low + width * (rng.uniform(*x.shape[1:], dtype=x.dtype) < 0.5).to(x.dtype)
            return threat.project(torch.where(u < share, extreme, x), x)

        return _best_of(self.n, oracle, x, draw)
