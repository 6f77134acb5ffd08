"""The kernel distance of two sets of features.

Symbols: f and g are features, (N, F) and (M, F); k(a, b) = (<a, b> / F + 1)^3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.gan.measures.fid import check_sets

BLOCKS, LARGEST = 10, 1000
"""At least so many blocks, of at most so many features each."""


@dataclass(frozen=True)
class Kid:
    """The kernel distance.

    Attributes:
        value: The mean over the blocks; without bias, so it may be below 0 where the two distributions are alike.
        error: Its standard error, from how the blocks differ.
        blocks: How many there are.
        size: How many features each has of either set.
    """

    value: float
    error: float
    blocks: int
    size: int


def kid(f: Tensor, g: Tensor) -> Kid:
    """The unbiased estimate of the squared maximum mean discrepancy with a cubic kernel, over blocks.

    Binkowski, Sutherland, Arbel and Gretton, 2018, "Demystifying MMD GANs", https://arxiv.org/abs/1801.01401. Their blocks are
    drawn with replacement; here each feature is in one block, so that the blocks are independent and their spread is an error.

    Arguments:
        f: Features, with shape (N, F), in float64 and in random order.
        g: The others, with shape (M, F), likewise.

    Raises:
        UsageError: There are fewer than 20 of either, or they are of different sizes or not finite.

    >>> rng = torch.Generator().manual_seed(1)
    >>> found = kid(*torch.randn(2, 1000, 4, generator=rng, dtype=torch.float64))
    >>> abs(found.value) < 3 * found.error, found.blocks, found.size
    (True, 10, 100)
    """
    check_sets(f, g, least=2 * BLOCKS)
    n = min(len(f), len(g))
    size = min(LARGEST, n // BLOCKS)
    blocks = n // size
    pairs = zip(f[: blocks * size].split(size), g[: blocks * size].split(size), strict=True)
    values = torch.stack([_squared(a, b) for a, b in pairs])
    return Kid(float(values.mean()), float(values.std() / blocks**0.5), blocks, size)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """The estimate from n features each, with shape ()."""
    n = len(a)
    aa, bb, ab = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
    return (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (n * (n - 1)) - 2 * ab.mean()
