"""What every detector is, and how one sees clean examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from advkit.data import Data
from advkit.errors import UsageError

BATCH = 250
"""How many examples are shown to a model at a time while a detector is fitted."""


class Detector(Protocol):
    """Frozen data whose fields are the settings; fitted, a module from inputs (N, *) to scores (N,), greater = more suspicious.

    A score is differentiable in the input, or its module declares by :class:`advkit.adaptive.Straight` what stands in for a
    part that is not.
    """

    def fit(self, model: nn.Module, data: Data, rng: torch.Generator) -> nn.Module:
        """Learn from clean training examples, and from nothing else, what inputs of this model look like.

        Arguments:
            model: The classifier; it is not changed, and becomes part of the detector where that asks it.
            data: The examples.
            rng: Where random draws come from.

        Raises:
            UsageError: The detector cannot be fitted to such a model or such data.
        """


def batches(model: nn.Module, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples in order, (M, *) and (M,), where the model is and in what it computes.

    Raises:
        UsageError: There are fewer than two.
    """
    if len(data) < 2:
        raise UsageError(f"a detector was given {len(data)} examples of {data.name} to learn from; it needs at least two")
    like = next(model.parameters(), torch.empty(0))
    for start in range(0, len(data), BATCH):
        x, y = data.batch(start, start + BATCH)
        yield x.to(like.device, like.dtype), y.to(like.device)
