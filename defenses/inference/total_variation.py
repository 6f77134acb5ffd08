"""Total variation minimization of the input.

Symbols: m is 1 at the entries that are kept and 0 at those that are dropped, lambda the weight, D the differences between
neighbours (down, across), z the image and p its dual, with |p| <= lambda at each pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advkit import spec
from advkit.defenses.inference.defended import Defended, opaque
from advkit.errors import UsageError
from advkit.streams import Streams

STEP = 8**-0.5
"""Of both variables: the greatest that converges, as ||D||^2 <= 8."""


@dataclass(frozen=True)
class TotalVariation:
    """t(x) = argmin_z 1/2 sum m (z - x)^2 + lambda sum |D z|: the simplest image that agrees with x where pixels are kept.

    Guo, Rana, Cisse and van der Maaten, 2018, "Countering adversarial images using input transformations",
    https://arxiv.org/abs/1711.00117; nothing dropped, the model of Rudin, Osher and Fatemi, 1992, "Nonlinear total variation
    based noise removal algorithms". Solved for each channel by the primal-dual steps of Chambolle and Pock, 2011, "A
    first-order primal-dual algorithm for convex problems with applications to imaging". An adaptive attack takes the
    gradient of these steps.

    Arguments:
        weight: lambda, at least 0.
        drop: The share of pixels that are dropped, drawn anew for each input and call; at least 0 and less than 1.
        steps: How many steps the solver takes.
        seed: Of what is dropped.

    Raises:
        UsageError: A setting is something else.
    """

    weight: float = 0.03
    drop: float = 0.5
    steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        spec.check_at_least("total-variation: weight", self.weight, 0)
        if not 0 <= self.drop < 1:
            raise UsageError(f"total-variation: drop is {self.drop}; it should be at least 0 and less than 1")
        spec.check_whole("total-variation: steps", self.steps, 1)
        spec.check_whole("total-variation: seed", self.seed, 0)

    @property
    def draws(self) -> int:
        """1 where no pixel is dropped."""
        return 10 if self.drop else 1

    def exact(self, x: Tensor, rng: Streams) -> Tensor:
        """The minimizer."""
        return opaque(self.guide(x.detach(), rng), x)

    def guide(self, x: Tensor, rng: Streams) -> Tensor:
        """The same, with the gradient of the solver's steps."""
        m = (rng.uniform(1, *x.shape[2:], dtype=x.dtype) >= self.drop).to(x.dtype)
        z, p = x * m, x.new_zeros(2, *x.shape)
        ahead = z
        for _ in range(self.steps):
            p = p + STEP * _differences(ahead)
            p = p * (self.weight / p.square().sum(0).clamp(min=self.weight**2 + torch.finfo(x.dtype).tiny).sqrt())
            new = (z - STEP * _transposed(p) + STEP * m * x) / (1 + STEP * m)
            z, ahead = new, 2 * new - z
        return z.clamp(0, 1)

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """The model behind it."""
        return Defended(self, model)


def _differences(z: Tensor) -> Tensor:
    """D z, with shape (2, *): to the next entry down and across, 0 at the last."""
    down = torch.cat([z[..., 1:, :] - z[..., :-1, :], torch.zeros_like(z[..., :1, :])], -2)
    across = torch.cat([z[..., 1:] - z[..., :-1], torch.zeros_like(z[..., :1])], -1)
    return torch.stack([down, across])


def _transposed(p: Tensor) -> Tensor:
    """D^T p, for p (2, *) that is 0 at the last entries."""
    down, across = p
    first = torch.cat([torch.zeros_like(down[..., :1, :]), down[..., :-1, :]], -2)
    return first - down + torch.cat([torch.zeros_like(across[..., :1]), across[..., :-1]], -1) - across
