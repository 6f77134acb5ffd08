"""Fewer bits for each entry of the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from advkit.defenses.inference.defended import Defended
from advkit.errors import UsageError
from advkit.streams import Streams


@dataclass(frozen=True)
class BitDepth:
    """t(x) = round(x * (2^b - 1)) / (2^b - 1): each entry is the nearest of 2^b values from 0 to 1.

    Xu, Evans and Qi, 2018, "Feature squeezing: detecting adversarial examples in deep neural networks",
    https://arxiv.org/abs/1704.01155. Its gradient is 0; an adaptive attack takes that of the identity.

    Arguments:
        bits: b, from 1 to 16.

    Raises:
        UsageError: b is something else.
    """

    bits: int = 3
    draws = 1
    seed = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise UsageError(f"bit-depth: bits is {self.bits}; it should be from 1 to 16")

    def exact(self, x: Tensor, rng: Streams) -> Tensor:
        """The rounded images."""
        most = 2**self.bits - 1
        return (x * most).round() / most

    def guide(self, x: Tensor, rng: Streams) -> Tensor:
        """The identity."""
        return x

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """The model behind it."""
        return Defended(self, model)
