"""Has the generator left out part of the data?

Symbols: the data are divided into B bins; p_b is the share of the data in bin b, q_b that of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 50
"""How many bins; with fewer data, a bin for each ten."""
ROUNDS = 10
"""Of Lloyd's algorithm, which finds the bins."""
DATA, SAMPLES = 5000, 1000
"""How many examples the bins are made of, and how many samples are counted."""
LEFT = 0.2
"""A bin with less than this share of the samples that it should have is all but left out."""
ALARM = 0.3
"""The share of the data in such bins from which on the generator has collapsed."""


@dataclass(frozen=True)
class Bins:
    """Clusters of the data, into which samples should fall as often as data do.

    Richardson and Weiss, 2018, "On GANs and GMMs", https://arxiv.org/abs/1805.12462, whose number of statistically different
    bins this simplifies: what counts here is the share of the data that samples all but leave out. No labels are needed.

    Attributes:
        centres: The clusters' means, with shape (B, D).
        shares: p, with shape (B,).
    """

    centres: Tensor
    shares: Tensor

    @classmethod
    def of(cls, x: Tensor, rng: torch.Generator) -> Bins:
        """The clusters of data (N, *), by k-means from random examples."""
        flat = x.flatten(1)
        centres = flat[torch.randperm(len(flat), generator=rng)[: max(2, min(BINS, len(flat) // 10))]].clone()
        for _ in range(ROUNDS):
            nearest = torch.cdist(flat, centres).argmin(1)
            n = nearest.bincount(minlength=len(centres)).unsqueeze(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, flat)
            centres = torch.where(n > 0, sums / n.clamp(min=1), centres)
        nearest = torch.cdist(flat, centres).argmin(1)
        return cls(centres, nearest.bincount(minlength=len(centres)) / len(flat))

    def lost(self, x: Tensor) -> float:
        """The share of the data in bins that samples (N, *) all but leave out: q_b < p_b / 5."""
        q = torch.cdist(x.flatten(1), self.centres).argmin(1).bincount(minlength=len(self.centres)) / len(x)
        return float(self.shares[q < LEFT * self.shares].sum())
