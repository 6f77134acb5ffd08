"""Whether a generator's own discriminator still tells its samples from data.

Symbols: of n scores of data and n of samples, the upper half is called data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advkit.errors import UsageError
from advkit.gan.pair import Pair
from advkit.gan.source import BATCH, part


def told_apart(real: Tensor, fake: Tensor) -> tuple[int, int]:
    """How many of the data are in the upper half of all scores, and how many there are.

    As many samples are then in the lower half, so it is the share that is told apart: 1/2 at the equilibrium of Goodfellow et
    al., 2014, "Generative adversarial networks", https://arxiv.org/abs/1406.2661. The middle is that of the scores, because the
    losses differ in where theirs is, and some have none. Ties at the middle are shared out, rounded down.

    Arguments:
        real: The scores of data, with shape (N,).
        fake: The scores of samples, with shape (N,).

    Raises:
        UsageError: The numbers differ, or there are none.

    >>> told_apart(torch.tensor([3.0, 2.0, -1.0]), torch.tensor([0.0, -2.0, 1.0]))
    (2, 3)
    """
    if len(real) != len(fake) or not len(real):
        raise UsageError(f"there are scores of {len(real)} data and {len(fake)} samples; there should be as many of each")
    n = len(real)
    middle = torch.cat([real, fake]).sort(descending=True).values[n - 1]
    above = int((real > middle).sum())
    tied, tied_all = int((real == middle).sum()), int((real == middle).sum() + (fake == middle).sum())
    places = n - above - int((fake > middle).sum())
    return above + tied * places // tied_all, n


def scores(pair: Pair, x: Tensor, y: Tensor | None) -> Tensor:
    """The discriminator's scores, with shape (N,).

    Arguments:
        pair: The generator with its discriminator.
        x: Data or samples, not both, with shape (N, *), in the pair's range: a discriminator may look at a batch as a whole.
        y: Their classes, with shape (N,); used by a conditional pair.
    """
    parts = range(0, len(x), BATCH)
    return torch.cat([pair.score(x[i : i + BATCH], part(y, i) if pair.classes else None) for i in parts])
