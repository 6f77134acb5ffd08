"""How many different pictures a generator draws, by the birthday paradox.

Symbols: among N samples there are M = N (N - 1) / 2 pairs, of which C collide: they show as good as the same picture. Of K
pictures that are equally likely a pair shows the same with a probability of 1 / K, so K is about M / C. Where they are not,
that is 1 / sum_k p_k^2, the number of equally likely ones that would collide as often, which is no more than there are.

When do two samples show the same picture? When their thumbnails are closer than two fifths of the distance at which real
examples differ there. That distance is the lesser of two: from the sample to the third nearest of the examples that are held
out, and from the nearest of these to its own third nearest. It is small for a plain picture, such as a 1, and large for one
with many details; the third, because then neither a generator that draws held-out examples nor a double among them makes it 0.
Thumbnails, because smooth pictures are closer to each other than sharp ones, pixel by pixel, without being fewer, and noise
makes copies differ; pictures that differ in details alone, as noise does, count as the same. Real examples hardly ever collide
so: of the 50 million pairs of 10,000 of MNIST's two do. How often they do is counted on the data at hand, and what a generator
has is what is beyond that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.errors import UsageError
from advkit.gan.measures.neighbours import nearest, squared

SIDE = 7
"""Of a thumbnail, in pixels."""
PART = 0.4
"""Of the distance at which real examples differ, below which two samples show the same."""
THIRD = 3
"""The held-out example that is taken for another."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Birthday:
    """The size of a generator's support.

    Attributes:
        collisions: C, the pairs of samples that show the same.
        pairs: M.
        real_collisions: The same among real examples.
        real_pairs: Their pairs.
        support: The estimate; inf where samples do not collide more than real examples, beyond chance: all that is known then
            is ``low``.
        low: The lower end of the 95 % interval of the support.
        high: The upper end, which may be inf.
    """

    collisions: int
    pairs: int
    real_collisions: int
    real_pairs: int
    support: float
    low: float
    high: float

    @property
    def batch(self) -> float:
        """How many samples hold two of the same in half of all cases: sqrt(2 ln 2 K); inf where K is not known."""
        return math.sqrt(2 * math.log(2) * self.support)


def thumbnails(x: Tensor) -> Tensor:
    """Images (N, C, H, W), shrunk to 7 x 7 by taking means, with shape (N, D); what is no image only flat.

    >>> thumbnails(torch.ones(2, 1, 28, 28)).shape
    torch.Size([2, 49])
    """
    small = F.adaptive_avg_pool2d(x, (min(SIDE, x.shape[2]), min(SIDE, x.shape[3]))) if x.ndim == 4 else x
    return small.flatten(1)


def scale(x: Tensor, held: Tensor, exact: float = 0.0) -> Tensor:
    """Below which distance another sample shows the same, with shape (N,).

    Arguments:
        x: Thumbnails, with shape (N, D).
        held: Those of real examples that nothing was learned from, with shape (H, D).
        exact: The least scale: a distance that only rounding makes.

    Raises:
        UsageError: There are fewer than four held-out examples.
    """
    apart = nearest(held, held, THIRD, own=True)[0][:, -1]
    distances, index = nearest(x, held, THIRD)
    return (PART * torch.minimum(distances[:, -1], apart[index[:, 0]])).clamp(min=exact)


def collisions(x: Tensor, scales: Tensor) -> Tensor:
    """With how many others each sample collides, with shape (N,): those that are closer than the scales of both.

    Arguments:
        x: Thumbnails, with shape (N, D).
        scales: The scale of each, with shape (N,).
    """
    near = scales.square()
    found = []
    for first, last, block in squared(x, x, own=True):
        found.append((block <= torch.minimum(near, near[first:last].unsqueeze(1))).sum(1))
    return torch.cat(found)


def birthday(others: Tensor, real: Tensor) -> Birthday:
    """The support of a generator, from the collisions of its samples and those of real examples.

    Arora and Zhang, 2017, "Do GANs actually learn the distribution? An empirical study", https://arxiv.org/abs/1706.08224.
    Their test bounds the support from above where a person finds two of the same in a batch; here all pairs of the batch are
    counted, and no person is needed. The interval is that of a Poisson count (Garwood, 1936,
    https://doi.org/10.1093/biomet/28.3-4.437), wider where some pictures are more likely than others, because pairs with a
    sample in common then depend on each other. The upper end allows for as many collisions as real examples could have, the
    lower end for none of them.

    Arguments:
        others: With how many others each sample collides, with shape (N,).
        real: The same for real examples, with shape (R,).

    Raises:
        UsageError: There are fewer than two of either.

    >>> found = birthday(torch.ones(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64))
    >>> found.collisions, found.pairs, round(found.support), round(found.low), round(found.high)
    (50, 4950, 99, 75, 148)
    """
    n, r = len(others), len(real)
    if min(n, r) < 2:
        raise UsageError(f"there are {n} samples and {r} real examples; there should be at least two of each")
    c, pairs, c_real, pairs_real = int(others.sum()) // 2, n * (n - 1) // 2, int(real.sum()) // 2, r * (r - 1) // 2
    low, high = _interval(c, _spread(others))
    chance = _interval(c_real, _spread(real))[1] / pairs_real
    least, most = low / pairs - chance, high / pairs
    found = least > 0
    support = 1 / (c / pairs - c_real / pairs_real) if found else math.inf
    return Birthday(c, pairs, c_real, pairs_real, support, 1 / most, 1 / least if found else math.inf)


def _spread(others: Tensor) -> float:
    """The variance of the number of collisions over that of a Poisson count, at least 1.

    Var C = C + 2 W - N (N - 1) (N - 2) q^2, where W counts the twos of colliding pairs with a sample in common, and q = C / M.
    """
    n, d = len(others), others.double()
    c = float(d.sum()) / 2
    if not c:
        return 1.0
    q = 2 * c / (n * (n - 1))
    return max(1.0, 1 + (float((d * (d - 1)).sum()) - n * (n - 1) * (n - 2) * q**2) / c)


def _interval(count: int, spread: float) -> tuple[float, float]:
    """The interval of the mean of a count whose variance is so many times its mean."""
    from scipy.stats import chi2

    tail, c = (1 - CONFIDENCE) / 2, count / spread
    low = float(chi2.ppf(tail, 2 * c)) / 2 if count else 0.0
    return spread * low, spread * float(chi2.ppf(1 - tail, 2 * c + 2)) / 2
