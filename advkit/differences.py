"""Gradients from scores alone: differences of a loss between the two sides of a point.

Symbols: x_t is the iterate, L the loss, u a random direction, sigma how far to both sides of x_t the loss is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from advkit.losses import Loss
from advkit.norms import per_row
from advkit.oracle import Oracle
from advkit.threat import Lp

CANDIDATES = 512
"""How many candidates are sent at once, at most, where the rows are so few that several pairs of each fit."""

Draw = Callable[[Tensor], Tensor]
"""The numbers of rows, (M,), to the next direction of each, (M, *)."""


def shares(total: int, most: int) -> Iterator[int]:
    """``total`` in parts of ``most``, the last one of what is left.

    >>> list(shares(7, 3))
    [3, 3, 1]
    """
    for begin in range(0, total, most):
        yield min(most, total - begin)


def difference(
    oracle: Oracle, loss: Loss, x_t: Tensor, x: Tensor, threat: Lp, rows: Tensor, pairs: int, sigma: float, draw: Draw
) -> Tensor:
    """The mean over pairs of (L(x_t + sigma * u) - L(x_t - sigma * u)) / (2 * sigma) * u for ``rows``, with shape (M, *).

    Both sides are projected first, so that each is an input that may succeed. In l_inf that halves what an entry adds where
    only one side is allowed, and keeps its sign. A pair is two forward passes.

    Arguments:
        oracle: The oracle.
        loss: L.
        x_t: The iterates of all rows, with shape (N, *).
        x: The clean inputs, with shape (N, *).
        threat: The threat model.
        rows: The numbers of the rows, with shape (M,).
        pairs: How many directions.
        sigma: sigma, in the units of the data.
        draw: Makes the directions.
    """
    at, clean = x_t[rows], x[rows]
    g = torch.zeros_like(at)
    for n in shares(pairs, max(1, CANDIDATES // max(1, 2 * len(rows)))):
        u = torch.stack([draw(rows) for _ in range(n)])
        sides = torch.stack([at + sigma * u, at - sigma * u])
        z = threat.project(sides.flatten(0, 2), clean.repeat(2 * n, *(1,) * (x.ndim - 1)))
        L = oracle.loss(z, loss, rows.repeat(2 * n)).view(2, n, -1)
        # A row that is done has -inf on both sides.
        slope = (L[0] - L[1]).nan_to_num(0.0, 0.0, 0.0)
        for j in range(n):
            g += per_row(slope[j], g) * u[j]
    return g / (2 * sigma * pairs)
