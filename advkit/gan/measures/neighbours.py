"""Nearest neighbours in blocks, so that no more than a block of distances is in memory.

Symbols: x are N points and a those among which neighbours are sought, M of them, both (*, D) once flat. ||x - a||^2 is
||x||^2 - 2 <x, a> + ||a||^2, a product of matrices; the distances that are returned are computed again from differences,
because the sum loses the digits of small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from advkit.errors import UsageError

BLOCK, ROWS = 2**24, 512
"""The most distances, and the most rows of them, that are in memory at a time."""
Tell = Callable[[float], None]
"""Called with the share that is done."""


def quiet(share: float) -> None:
    """Say nothing."""


def squared(x: Tensor, a: Tensor, own: bool = False, tell: Tell = quiet) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of squared distances: the first and the last row, and the block with shape (last - first, M).

    Arguments:
        x: Points, with shape (N, D).
        a: The others, with shape (M, D).
        own: Whether both are the same points: a point is then infinitely far from itself.
        tell: Called with the share that is done, after each block.
    """
    # Around their mean the points are shorter, and the sum loses fewer digits.
    middle = a.mean(0)
    x, a = x - middle, a - middle
    lengths, step = a.square().sum(1), max(1, min(ROWS, BLOCK // len(a)))
    for first in range(0, len(x), step):
        part = x[first : first + step]
        last = first + len(part)
        block = torch.addmm(lengths, part, a.T, alpha=-2).add_(part.square().sum(1, keepdim=True)).clamp_(min=0)
        if own:
            block[:, first:last].fill_diagonal_(torch.inf)
        yield first, last, block
        tell(last / len(x))


def nearest(x: Tensor, a: Tensor, k: int = 1, *, own: bool = False, tell: Tell = quiet) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest of ``a`` for each point of ``x``: distances, rising, and their numbers, both with shape (N, k).

    Arguments:
        x: Points, with shape (N, *).
        a: Those among which neighbours are sought, with shape (M, *).
        k: How many.
        own: Whether both are the same points, and none is its own neighbour.
        tell: Called with the share that is done.

    Raises:
        UsageError: There are fewer than ``k``.

    >>> nearest(torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [2.0], [8.5]]), 2)
    (tensor([[1.0000, 2.0000],
            [3.0000, 3.5000]]), tensor([[0, 1],
            [1, 2]]))
    """
    x, a = x.flatten(1), a.flatten(1)
    if len(a) - own < k:
        raise UsageError(f"{k} neighbours are sought among {len(a) - own} points; there should be as many")
    found = []
    for first, last, block in squared(x, a, own, tell):
        index = block.topk(k, dim=1, largest=False).indices
        distance = (x[first:last].unsqueeze(1) - a[index]).norm(dim=2)
        # Rounding may have changed the order of two that are as good as equal.
        order = distance.argsort(dim=1)
        found.append((distance.gather(1, order), index.gather(1, order)))
    distances, numbers = (torch.cat(parts) for parts in zip(*found, strict=True))
    return distances, numbers
