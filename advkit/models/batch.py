"""Programs that were compiled for certain shapes, called with any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advkit.errors import ModelError
from advkit.oracle import logits_of


class FixedBatch(nn.Module):
    """A program that takes batches of certain sizes, as a module that takes any: chunks, the last one padded.

    Arguments:
        inner: Inputs (M, *) to outputs (M, K), for ``least`` <= M <= ``most``.
        shape: The shape of an example; None for a size that is free.
        least: The fewest examples that the program takes.
        most: The most; None for no limit.
    """

    def __init__(
        self, inner: Callable[[Tensor], Any], shape: Sequence[int | None], least: int = 1, most: int | None = None
    ) -> None:
        super().__init__()
        self.inner, self.shape, self.least, self.most = inner, tuple(shape), least, most

    def forward(self, x: Tensor) -> Tensor:
        """The logits, with shape (N, K).

        Raises:
            ModelError: The examples have another shape than the program takes.
        """
        self._check(x)
        chunks = [x] if self.most is None else x.split(self.most)
        return torch.cat([logits_of(self.inner(self._padded(chunk)))[: len(chunk)] for chunk in chunks])

    def _check(self, x: Tensor) -> None:
        given = tuple(x.shape[1:])
        if len(given) != len(self.shape) or any(a not in (None, b) for a, b in zip(self.shape, given, strict=True)):
            wanted = "(" + ", ".join("any" if size is None else str(size) for size in self.shape) + ")"
            raise ModelError(
                f"the model takes examples of shape {wanted} and got {given}; --size changes the height and width of images"
            )

    def _padded(self, x: Tensor) -> Tensor:
        missing = self.least - len(x)
        return x if missing <= 0 else torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])
