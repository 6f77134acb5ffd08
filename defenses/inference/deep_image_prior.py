"""Purification by a deep image prior.

Symbols: f is a small network with weights theta, fresh for each input and call; z is noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import spec
from advkit.defenses.inference.defended import Defended, opaque
from advkit.streams import Streams

LEVELS = 2
"""How often the image doubles on its way through f."""


@dataclass(frozen=True)
class DeepImagePrior:
    """t(x) = f(z; theta) after a few steps of Adam on ||f(z; theta) - x||^2: what a network learns first of an image.

    Ulyanov, Vedaldi and Lempitsky, 2018, "Deep image prior", https://arxiv.org/abs/1711.10925. f is small: convolutions of
    3 x 3, each normalized and followed by a leaky ReLU and, but for the last, a doubling; then a sigmoid. It has no gradient;
    an adaptive attack takes that of the identity, and the mean over draws. Slow: each answer is a training.

    Arguments:
        steps: How many steps of Adam.
        width: The channels of f.
        lr: Adam's rate.
        seed: Of z and of the first theta.

    Raises:
        UsageError: A setting is not greater than 0, or the seed less than 0.
    """

    steps: int = 100
    width: int = 16
    lr: float = 0.03
    seed: int = 0
    draws = 2

    def __post_init__(self) -> None:
        spec.check_whole("deep-image-prior: steps", self.steps, 1)
        spec.check_whole("deep-image-prior: width", self.width, 1)
        spec.check_positive("deep-image-prior: lr", self.lr)
        spec.check_whole("deep-image-prior: seed", self.seed, 0)

    def exact(self, x: Tensor, rng: Streams) -> Tensor:
        """The images that f has learned."""
        # Under inference_mode nothing could be learned.
        with torch.inference_mode(False), torch.enable_grad():
            return opaque(self._learned(x.detach().clone(), rng), x)

    def guide(self, x: Tensor, rng: Streams) -> Tensor:
        """The identity."""
        return x

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """The model behind it."""
        return Defended(self, model)

    def _learned(self, x: Tensor, rng: Streams) -> Tensor:
        """What f makes of z in the end, with the shape of x."""
        c, h, w = x.shape[1:]
        k, least = self.width, 2**LEVELS
        z = rng.normal(k, -(-h // least), -(-w // least), dtype=x.dtype)
        theta = [_weights(k, k, rng, x) for _ in range(LEVELS + 1)] + [_weights(k, c, rng, x)]
        adam = torch.optim.Adam(theta, self.lr)
        for _ in range(self.steps):
            adam.zero_grad()
            (_network(z, theta)[..., :h, :w] - x).square().sum().backward()
            adam.step()
        return _network(z, theta)[..., :h, :w]


def _weights(inwards: int, outwards: int, rng: Streams, like: Tensor) -> Tensor:
    """A convolution for each row, with shape (N, outwards, inwards, 3, 3)."""
    deviation = (2 / (9 * inwards)) ** 0.5
    return (deviation * rng.normal(outwards, inwards, 3, 3, dtype=like.dtype)).requires_grad_(True)


def _network(z: Tensor, theta: list[Tensor]) -> Tensor:
    """f(z; theta), each row with weights of its own, in [0, 1]."""
    for i, weights in enumerate(theta):
        z = _convolved(z, weights)
        if i < len(theta) - 1:
            z = F.leaky_relu(F.instance_norm(z), 0.2)
        if i < LEVELS:
            z = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
    return z.sigmoid()


def _convolved(z: Tensor, weights: Tensor) -> Tensor:
    """Each row's channels through its own convolution, as groups of one."""
    n, outwards = weights.shape[:2]
    joined = F.conv2d(z.flatten(0, 1).unsqueeze(0), weights.flatten(0, 1), padding=1, groups=n)
    return joined.view(n, outwards, *z.shape[2:])
