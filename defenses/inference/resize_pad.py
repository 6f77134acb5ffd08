"""Random resizing and padding of the input.

Symbols: n is the side of the input, s that of the resized image, S that of the output, o where the image lies in it.
"""

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
class ResizePad:
    """t(x) is x resized to a random size s and laid at a random place into an image of 0s of size S.

    Xie, Wang, Zhang, Ren and Yuille, 2018, "Mitigating adversarial effects through randomization",
    https://arxiv.org/abs/1711.01991, with n = 299, S = 331 and s from 299. A network of dense layers takes no image larger
    than its own, so by default S = n and s is less. Bilinear; s is uniform among the whole numbers from least * n to
    most * n, and o among those that fit. It has a gradient, so an adaptive attack takes the mean over draws.

    Arguments:
        least: The least s / n, greater than 0.
        most: S / n.
        seed: Of the sizes and places, drawn anew for each input and call.

    Raises:
        UsageError: A setting is something else.
    """

    least: float = 0.85
    most: float = 1.0
    seed: int = 0
    draws = 10
    guide = None

    def __post_init__(self) -> None:
        spec.check_positive("resize-pad: least", self.least)
        spec.check_at_least("resize-pad: most", self.most, self.least)
        spec.check_whole("resize-pad: seed", self.seed, 0)

    def exact(self, x: Tensor, rng: Streams) -> Tensor:
        """The images, with shape (N, C, S, S), or as much in each direction where they are not square."""
        size = rng.uniform(1, dtype=torch.float64)[:, 0]
        down, across = (self._weights(n, size, rng.uniform(1, dtype=torch.float64)[:, 0], x) for n in x.shape[2:])
        return down.unsqueeze(1) @ x @ across.unsqueeze(1).mT

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """The model behind it."""
        return Defended(self, model)

    def _weights(self, n: int, size: Tensor, place: Tensor, x: Tensor) -> Tensor:
        """How much of each of n entries is in each of S, for draws uniform in [0, 1), with shape (N, S, n)."""
        least, most = max(1, round(self.least * n)), max(1, round(self.most * n))
        s = least + (size * (most - least + 1)).floor()
        o = (place * (most - s + 1)).floor()
        at = torch.arange(most, dtype=torch.float64, device=x.device) - o.unsqueeze(1)
        s = s.unsqueeze(1)
        # The centre of an entry of the resized image, in entries of x.
        source = ((at + 0.5) * n / s - 0.5).clamp(0, n - 1)
        entry = torch.arange(n, dtype=torch.float64, device=x.device)
        weights = (1 - (source.unsqueeze(2) - entry).abs()).clamp(min=0)
        return (weights * ((at >= 0) & (at < s)).unsqueeze(2)).to(x.dtype)
