"""Sparse-RS: random search for a few pixels, with scores only.

Symbols: M is the set of the k pixels that are changed, x_hat the best candidate so far, L its margin, alpha the share of M
that a query swaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

SCHEDULE = ((0, 2), (50, 4), (200, 5), (500, 6), (1000, 8), (2000, 10), (4000, 12), (6000, 15), (8000, 20))
"""From which iteration on, of 10,000, alpha is the first one divided by what."""


@dataclass(frozen=True)
class SparseRS:
    r"""Swap a share alpha of the pixels in M for others, with random colours, and keep the swap if the margin grows.

    A colour sets each entry of the pixel to low or high. The radius counts entries, so a pixel of C channels counts as C and
    k = floor(eps / C); where that is 0 single entries are changed. A colour that is the clean pixel's own is turned over, so
    that no pixel of M is wasted.

    Croce, Andriushchenko, Singh, Flammarion and Hein, 2022, "Sparse-RS: a versatile framework for query-efficient sparse
    black-box adversarial attacks", https://arxiv.org/abs/2009.12834.

    Arguments:
        queries: How many forward passes are made.
        alpha: The first alpha.
    """

    queries: int = 5000
    alpha: float = 0.3
    access = Access.SCORES
    norms = (0.0,)
    minimum = False
    paper = "Croce et al. 2022"

    def __post_init__(self) -> None:
        check_whole("sparse-rs: queries", self.queries, 1)
        check_positive("sparse-rs: alpha", self.alpha)

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The best candidate, with shape (N, *)."""
        channels = x[0].numel() // math.prod(x.shape[-2:]) if x.ndim > 3 else x.shape[1] if x.ndim == 3 else 1
        channels = channels if threat.eps >= channels else 1
        pixels = x.reshape(len(x), channels, -1)
        size = pixels.shape[2]
        k = min(int(threat.eps) // channels, max(1, size - 1))
        # A row's first k numbers are M.
        order = rng.uniform(size, dtype=torch.float64).argsort(dim=1, stable=True)
        x_hat = _coloured(pixels, pixels, order[:, :k], rng.uniform(channels, k) < 0.5, threat)
        L = oracle.loss(x_hat.view_as(x), margin)
        for i in range(1, self.queries):
            rows = oracle.live
            swapped = min(max(1, int(self._share(i) * k)), k, size - k)
            mine = order[rows]
            _shuffle(mine, 0, k, swapped, rows, rng)
            _shuffle(mine, k, size, swapped, rows, rng)
            leave, enter = mine[:, :swapped].clone(), mine[:, k : k + swapped].clone()
            old = _places(leave, channels)
            tried = x_hat[rows].scatter(2, old, pixels[rows].gather(2, old))
            coin = rng.uniform(channels, swapped, rows=rows) < 0.5
            tried = _coloured(tried, pixels[rows], enter, coin, threat)
            L_tried = oracle.loss(tried.view(-1, *x.shape[1:]), margin, rows)
            better = L_tried > L[rows]
            mine[:, :swapped], mine[:, k : k + swapped] = enter, leave
            kept = rows[better]
            x_hat[kept], L[kept], order[kept] = tried[better], L_tried[better], mine[better]
        return x_hat.view_as(x)

    def _share(self, i: int) -> float:
        """The alpha of the i-th query."""
        progress = 10000 * i // self.queries
        return self.alpha / max((divisor for begin, divisor in SCHEDULE if progress > begin), default=1)


def _places(chosen: Tensor, channels: int) -> Tensor:
    return chosen.unsqueeze(1).expand(-1, channels, -1)


def _shuffle(order: Tensor, begin: int, end: int, n: int, rows: Tensor, rng: Streams) -> None:
    """Put n random ones of the columns from ``begin`` to ``end`` first among these, in place (Fisher and Yates)."""
    for j in range(begin, begin + n):
        other = j + rng.integers(end - j, 1, rows=rows)
        here, there = order[:, j : j + 1].clone(), order.gather(1, other)
        order.scatter_(1, other, here)
        order[:, j : j + 1] = there


def _coloured(z: Tensor, pixels: Tensor, chosen: Tensor, coin: Tensor, threat: Lp) -> Tensor:
    """``z`` (M, C, P) with the pixels ``chosen`` (M, k) low where ``coin`` (M, C, k) says so and high elsewhere."""
    where = _places(chosen, z.shape[1])
    clean = pixels.gather(2, where)
    # width raises where the range is not finite.
    low, high = clean.new_tensor(threat.low), clean.new_tensor(threat.low + threat.width)
    same = (torch.where(coin, low, high) == clean).all(1, keepdim=True)
    return z.scatter(2, where, torch.where(coin ^ same, low, high))
