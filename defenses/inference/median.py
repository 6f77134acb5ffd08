"""A median filter on the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advkit import spec
from advkit.defenses.inference.defended import Defended
from advkit.streams import Streams


@dataclass(frozen=True)
class Median:
    """t(x)_ij is the median of the s x s entries around x_ij, in each channel; beyond an edge the image is mirrored.

    Xu, Evans and Qi, 2018, "Feature squeezing: detecting adversarial examples in deep neural networks",
    https://arxiv.org/abs/1704.01155. The same as ``scipy.ndimage.median_filter``: of an even number of entries, the upper of
    the two in the middle. Its gradient goes to the one entry that is the median, which an adaptive attack can use as it is.

    Arguments:
        size: s, at least 2.

    Raises:
        UsageError: s is less than 2.
    """

    size: int = 3
    draws = 1
    seed = 0
    guide = None

    def __post_init__(self) -> None:
        spec.check_whole("median: size", self.size, 2)

    def exact(self, x: Tensor, rng: Streams) -> Tensor:
        """The filtered images."""
        mirrored = x[:, :, self._index(x.shape[2], x)][:, :, :, self._index(x.shape[3], x)]
        windows = mirrored.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)
        return windows.kthvalue(self.size**2 // 2 + 1).values

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """The model behind it."""
        return Defended(self, model)

    def _index(self, n: int, x: Tensor) -> Tensor:
        """Which of n lines each line of the mirrored image is."""
        line = torch.arange(n + self.size - 1, device=x.device) - self.size // 2
        return torch.where(line % (2 * n) < n, line % (2 * n), 2 * n - 1 - line % (2 * n))
