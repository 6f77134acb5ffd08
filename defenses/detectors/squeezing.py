"""Feature squeezing: an input whose answer changes when detail is taken away is suspicious.

Symbols: f(x) are the class probabilities, s_i the squeezers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.adaptive import Straight
from advkit.data import Data
from advkit.defenses.inference.bit_depth import BitDepth
from advkit.defenses.inference.defended import Filter
from advkit.defenses.inference.median import Median
from advkit.errors import UsageError
from advkit.oracle import logits_of


@dataclass(frozen=True)
class Squeezing:
    r"""The score is max_i ||f(x) - f(s_i(x))||_1, in [0, 2]; the squeezers are fewer bits and a median filter.

    Xu, Evans and Qi, 2018, "Feature squeezing: detecting adversarial examples in deep neural networks",
    https://arxiv.org/abs/1704.01155. Their best for MNIST are 1 bit and a median of 2 x 2; for CIFAR-10 5 bits, a median of
    2 x 2 and a third squeezer, non-local means, which is not here. Nothing is learned but the range of the data.

    Rounding has no gradient; that of the identity stands in for it. The gradient of the distance vanishes where probabilities
    are 0 and 1; that of a divergence of the same sense, which goes on growing with the logits, stands in for it.

    Arguments:
        bits: How many bits each entry keeps, from 1 to 16.
        median: The side of the square whose median each entry becomes, at least 2.

    Raises:
        UsageError: A setting is something else.
    """

    bits: int = 5
    median: int = 2

    def __post_init__(self) -> None:
        self._squeezers()

    def _squeezers(self) -> tuple[BitDepth, Median]:
        return BitDepth(self.bits), Median(self.median)

    def fit(self, model: nn.Module, data: Data, rng: torch.Generator) -> nn.Module:
        """The fitted detector.

        Raises:
            UsageError: The data are no images.
        """
        if data.kind != "image":
            raise UsageError(f"squeezing is for images, and {data.name} holds {data.kind}; take another detector")
        return Squeezed(model, [Filter(squeeze, guided=True) for squeeze in self._squeezers()], data.low, data.high)


class Squeezed(nn.Module):
    """The fitted detector.

    Arguments:
        model: Inputs (N, C, H, W) to logits (N, K).
        squeezers: Images in [0, 1] to images in [0, 1].
        low: What is 0 in [0, 1].
        high: What is 1.
    """

    def __init__(self, model: nn.Module, squeezers: list[Filter], low: float, high: float) -> None:
        super().__init__()
        self.model, self.squeezers = model, nn.ModuleList(squeezers)
        self.low, self.width = low, high - low

    def forward(self, x: Tensor) -> Tensor:
        """The scores, with shape (N,)."""
        unit = (x - self.low) / self.width
        views = [x, *(self.low + self.width * squeeze(unit) for squeeze in self.squeezers)]
        z = logits_of(self.model(torch.cat(views))).view(len(views), len(x), -1)
        return Straight(_distance, _divergence)(z)


def _distance(z: Tensor) -> Tensor:
    """The greatest l_1 distance of the first view's probabilities from another's; (V, N, K) logits to (N,)."""
    f = z.softmax(2)
    return (f[1:] - f[0]).abs().sum(2).amax(0)


def _divergence(z: Tensor) -> Tensor:
    """Log(1 + J), where J sums Jeffreys' divergence KL(p, q) + KL(q, p) over the other views."""
    f = z.log_softmax(2)
    return ((f[1:].exp() - f[0].exp()) * (f[1:] - f[0])).sum((0, 2)).log1p()
