"""From a sample back to its code.

Symbols: x is an input in [0, 1], (N, *); z a code, (N, d); K classes.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

WIDTH = 32
"""Channels after the first halving of an image."""
HIDDEN = 512
"""Units of the dense layer above."""


class Inverter(nn.Module):
    """A network from inputs to codes and to the logits of classes.

    Zhao, Dua and Singh, 2018, "Generating natural adversarial examples", https://arxiv.org/abs/1710.11342. The head for
    classes is for conditional generators, which draw from a code and a class.

    Arguments:
        shape: Of one input.
        d: Entries of a code.
        classes: K; 0 where there are none.
    """

    def __init__(self, shape: tuple[int, ...], d: int, classes: int) -> None:
        super().__init__()
        image = len(shape) == 3 and min(shape[1:]) >= 8
        self.body = nn.Sequential(*(_convolutions(shape) if image else [nn.Flatten()]))
        units = 2 * WIDTH * math.prod(-(-side // 4) for side in shape[1:]) if image else math.prod(shape)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(units, HIDDEN), nn.ReLU())
        self.code = nn.Linear(HIDDEN, d)
        self.classify = nn.Linear(HIDDEN, classes) if classes else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, (N, d), and logits, (N, K)."""
        h = self.hidden(self.body(2 * x - 1))
        return self.code(h), h.new_zeros(len(h), 0) if self.classify is None else self.classify(h)


def _convolutions(shape: tuple[int, ...]) -> list[nn.Module]:
    sizes = [shape[0], WIDTH, 2 * WIDTH]
    pairs = itertools.pairwise(sizes)
    return [layer for a, b in pairs for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())]
