"""Translation invariance: gradients smoothed by a Gaussian kernel.

Symbols: sigma is the kernel's standard deviation in entries, W the kernel as an n x n matrix on an axis of length n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.combine import Lens, Wrapper
from advkit.engine import Attack
from advkit.losses import Loss
from advkit.oracle import Oracle, Through
from advkit.spec import check_positive
from advkit.streams import Streams
from advkit.surrogates import check_gradients
from advkit.threat import Lp


class _Smooth(Lens):
    """The oracle, with gradients convolved with a Gaussian kernel."""

    def __init__(self, oracle: Oracle, sigma: float) -> None:
        super().__init__(oracle)
        self.sigma = sigma

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient, smoothed over height and width, or over the last axis where there is no height."""
        values, g = self.oracle.grad(x_adv, loss, rows, towards=towards, through=through)
        g = g @ _kernel(g.shape[-1], self.sigma, g)
        return values, _kernel(g.shape[-2], self.sigma, g) @ g if g.ndim > 3 else g


def _kernel(n: int, sigma: float, like: Tensor) -> Tensor:
    """W: a Gaussian around each entry, cut off at 3 sigma, zeros beyond the ends; symmetric, with shape (n, n)."""
    index = torch.arange(-n + 1, n, device=like.device, dtype=like.dtype)
    weights = torch.exp(-0.5 * (index / sigma) ** 2) * (index.abs() <= 3 * sigma)
    # By the whole kernel's sum, also where the ends cut it.
    weights = weights / weights.sum()
    place = torch.arange(n, device=like.device)
    return weights[place.unsqueeze(1) - place + n - 1]


@dataclass(frozen=True)
class TI(Wrapper):
    r"""The attack with W * g in place of the gradient g: nearly the mean of the gradients of the input moved by a few entries.

    Dong, Pang, Su and Zhu, 2019, "Evading defenses to transferable adversarial examples by translation-invariant attacks",
    https://arxiv.org/abs/1904.02884. Images are smoothed over height and width, each channel for itself, and an input of shape
    (N, D) or (N, C, T) over its last axis. The paper smooths images of 299 pixels with sigma = 7/3; small images need less.

    Arguments:
        attack: An attack with gradients.
        sigma: The standard deviation of the kernel, in entries.
    """

    attack: Attack
    sigma: float = 0.7
    paper = "Dong et al. 2019"

    def __post_init__(self) -> None:
        check_gradients("ti", self.attack)
        check_positive("ti: sigma", self.sigma)

    @property
    def cost(self) -> int:
        """The attack's."""
        return self.attack.cost

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The attack's last iterate, with shape (N, *)."""
        return self.attack(_Smooth(oracle, self.sigma), x, threat, rng)
