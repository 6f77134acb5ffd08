"""Which classes a generator draws, as a classifier names them.

Symbols: of n samples, a share q_c is named class c; of the data, named by the same classifier, p_c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.errors import UsageError

PART = 0.1
"""A class is covered where samples have at least this part of the data's share."""
ALPHA = 0.01
"""How often any class that has half of its share is called missing, at most."""


@dataclass(frozen=True)
class Coverage:
    """The classes among samples beside those among data.

    Attributes:
        shares: q, one for each class.
        expected: p, one for each class.
        of: How many samples there are.
        present: How many classes the data have.
        covered: How many of these have q_c >= p_c / 10.
        missing: Those that have less, and, by the exact binomial test, not for want of samples: with half of the data's share
            they would have so few too rarely.
        distance: Half the sum of |p_c - q_c|: the share of samples that would have to be of another class.
        p_value: Of the chi-squared test that samples and data have the same shares.
    """

    shares: tuple[float, ...]
    expected: tuple[float, ...]
    of: int
    present: int
    covered: int
    missing: tuple[int, ...]
    distance: float
    p_value: float


def coverage(named: Tensor, data: Tensor, classes: int) -> Coverage:
    """Compare the classes that a classifier names.

    The data are named by the classifier too, so that its mistakes cancel. Counting modes with a classifier follows Metz, Poole,
    Pfau and Sohl-Dickstein, 2017, "Unrolled generative adversarial networks", https://arxiv.org/abs/1611.02163.

    Arguments:
        named: The classes of samples, with shape (N,) and dtype int64.
        data: The classes of data, with shape (M,).
        classes: How many the classifier knows.

    Raises:
        UsageError: There are no samples or no data.

    >>> found = coverage(torch.zeros(200, dtype=torch.int64), torch.arange(200) % 2, 2)
    >>> found.covered, found.missing, found.distance
    (1, (1,), 0.5)
    """
    from scipy.stats import binom

    if not len(named) or not len(data):
        raise UsageError(f"there are {len(named)} samples and {len(data)} data; there should be at least one of each")
    counts, known = (names.bincount(minlength=classes).double() for names in (named, data))
    q, p = counts / counts.sum(), known / known.sum()
    present = known > 0
    covered = present & (q >= PART * p)
    rare = torch.as_tensor(binom.cdf(counts.numpy(), len(named), p.numpy() / 2)) < ALPHA / int(present.sum())
    return Coverage(
        shares=tuple(q.tolist()),
        expected=tuple(p.tolist()),
        of=len(named),
        present=int(present.sum()),
        covered=int(covered.sum()),
        missing=tuple((present & ~covered & rare).nonzero().flatten().tolist()),
        distance=float((p - q).abs().sum() / 2),
        p_value=_same(counts, known),
    )


def _same(counts: Tensor, known: Tensor) -> float:
    from scipy.stats import chi2_contingency

    table = torch.stack([counts, known])
    table = table[:, table.sum(0) > 0]
    return float(chi2_contingency(table.numpy(), correction=False).pvalue) if table.shape[1] > 1 else 1.0


def agreement(named: Tensor, asked: Tensor) -> tuple[int, int]:
    """How many samples a classifier names as the class that was asked for, and how many there are; both (N,).

    >>> agreement(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))
    (2, 3)
    """
    return int((named == asked).sum()), len(asked)
