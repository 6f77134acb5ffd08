"""Convolutional adversarial networks.

Symbols: z is a code, (N, d), standard normal; x an image, (N, C, H, W), in [0, 1].
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor, nn

from advkit.errors import UsageError
from advkit.gan.layers import MinibatchDiscrimination, Scored
from advkit.spec import check_whole

LEAST = 4
"""Images are halved down to maps of at least this side."""


def halvings(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """How often an image can be halved, and the height and width that are left.

    Arguments:
        shape: (C, H, W).
        name: Of the networks, for the message.

    Raises:
        UsageError: It is no image, or one that cannot be halved.

    >>> halvings((1, 28, 28), "dcgan"), halvings((3, 32, 32), "dcgan")
    ((2, 7, 7), (3, 4, 4))
    """
    if len(shape) != 3:
        raise UsageError(f"the data have shape {tuple(shape)}; {name} draws images, (C, H, W)")
    _, height, width = shape
    n = 0
    while height % 2 == width % 2 == 0 and min(height, width) > LEAST:
        n, height, width = n + 1, height // 2, width // 2
    if not n:
        raise UsageError(f"the data are images of {shape[1]} x {shape[2]}; {name} needs an even height and width above {LEAST}")
    return n, height, width


class Centred(nn.Module):
    """[0, 1] to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """2 x - 1."""
        return 2 * x - 1


@dataclass(frozen=True)
class DCGAN:
    """Strided convolutions in both, batch normalization, ReLU in the generator and leaky ReLU in the discriminator.

    Radford, Metz and Chintala, 2016, "Unsupervised representation learning with deep convolutional generative adversarial
    networks", https://arxiv.org/abs/1511.06434.

    Arguments:
        d: Entries of a code.
        width: Channels at half the resolution; each halving has twice as many.
        minibatch: Kernels of minibatch discrimination in the discriminator; 0 for none.
        loss: Of the game.

    Raises:
        UsageError: A size is less than 1.
    """

    d: int = 100
    width: int = 32
    minibatch: int = 0
    loss: str = "non-saturating"
    conditional = False
    prior = "normal"
    paper = "Radford et al. 2016"

    def __post_init__(self) -> None:
        check_whole("dcgan: d", self.d, 1)
        check_whole("dcgan: width", self.width, 1)
        check_whole("dcgan: minibatch", self.minibatch, 0)

    def generator(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The generator, (N, d) to (N, C, H, W) in [0, 1].

        Raises:
            UsageError: Images of this shape cannot be halved.
        """
        n, height, width = halvings(shape, "dcgan")
        sizes = [self.width * 2**i for i in reversed(range(n))]
        layers: list[nn.Module] = [nn.Linear(self.d, sizes[0] * height * width, bias=False)]
        layers += [nn.Unflatten(1, (sizes[0], height, width)), nn.BatchNorm2d(sizes[0]), nn.ReLU()]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        return _started(nn.Sequential(*layers, nn.ConvTranspose2d(sizes[-1], shape[0], 4, 2, 1), nn.Sigmoid()))

    def discriminator(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The discriminator, (N, C, H, W) to scores (N,).

        Raises:
            UsageError: Images of this shape cannot be halved.
        """
        n, height, width = halvings(shape, "dcgan")
        sizes = [self.width * 2**i for i in range(n)]
        layers: list[nn.Module] = [Centred(), nn.Conv2d(shape[0], sizes[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        units = sizes[-1] * height * width
        beside = MinibatchDiscrimination(units, self.minibatch) if self.minibatch else None
        head = nn.Linear(units + self.minibatch, 1)
        return _started(Scored(nn.Sequential(*layers, nn.Flatten()), head, beside))


def _started(network: nn.Module) -> nn.Module:
    """The paper's first weights: normal with deviation 0.02 in convolutions, and about 1 in scales."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
    return network
