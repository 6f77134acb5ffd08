"""How many samples look like data, and how much of the data samples look like.

Symbols: f are features of data and g of samples, (N, F) and (M, F). A set's manifold is taken to be the balls around its
features that reach to the k-th nearest neighbour in the set.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advkit.gan.measures.fid import check_sets
from advkit.gan.measures.neighbours import nearest, squared

K = 3
"""The neighbour to which a ball reaches."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Quality and diversity apart.

    Attributes:
        precision: The share of samples inside the manifold of the data.
        recall: The share of the data inside the manifold of the samples.
        realistic: The share of samples whose realism, as the paper calls it, is at least 1: those inside the manifold of the
            data with only the smaller half of its balls. The ball of an outlier may hold anything; where noise has precision,
            this is the share to go by.
    """

    precision: float
    recall: float
    realistic: float


def precision_recall(f: Tensor, g: Tensor) -> PrecisionRecall:
    """The shares, in [0, 1].

    Kynkaanniemi, Karras, Laine, Lehtinen and Aila, 2019, "Improved precision and recall metric for assessing generative
    models", https://arxiv.org/abs/1904.06991. Both depend on how many features there are, so sets of one size are compared, and
    other real data do not reach 1.

    Arguments:
        f: Features of data, with shape (N, F).
        g: Features of samples, with shape (M, F).

    Raises:
        UsageError: There are fewer than four of either, or they are of different sizes or not finite.
    """
    check_sets(f, g, least=K + 1)
    r_f, r_g = _radii(f), _radii(g)
    small = r_f <= r_f.median()
    return PrecisionRecall(_inside(g, f, r_f), _inside(f, g, r_g), _inside(g, f[small], r_f[small]))


def _radii(f: Tensor) -> Tensor:
    """The squared radii of the balls, with shape (N,)."""
    return nearest(f, f, K, own=True)[0][:, -1].square()


def _inside(x: Tensor, a: Tensor, radii: Tensor) -> float:
    """The share of ``x`` that is in a ball around one of ``a``."""
    return sum(int((block <= radii).any(1).sum()) for _, _, block in squared(x, a)) / len(x)
