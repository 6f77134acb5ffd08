"""The first adversarial networks: two multilayer perceptrons.

Symbols: z is a code, (N, d), uniform in [0, 1); x an input, (N, *), in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from advkit.gan.layers import Scored
from advkit.spec import check_whole


class Maxout(nn.Module):
    """The greatest of several linear functions, for each unit.

    Goodfellow, Warde-Farley, Mirza, Courville and Bengio, 2013, "Maxout networks", https://arxiv.org/abs/1302.4389.

    Arguments:
        inward: How many units come in.
        outward: How many go out.
        pieces: Linear functions for each.
    """

    def __init__(self, inward: int, outward: int, pieces: int) -> None:
        super().__init__()
        self.pieces, self.linear = pieces, nn.Linear(inward, outward * pieces)

    def forward(self, h: Tensor) -> Tensor:
        """(N, inward) to (N, outward)."""
        return self.linear(h).unflatten(1, (-1, self.pieces)).amax(2)


@dataclass(frozen=True)
class MLP:
    """Dense layers on both sides: rectifiers in the generator, maxout and dropout in the discriminator.

    Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville and Bengio, 2014, "Generative adversarial nets",
    https://arxiv.org/abs/1406.2661, with the sizes of its MNIST experiment.

    Arguments:
        d: Entries of a code.
        width: Units of each of the generator's two hidden layers.
        maxout: Units of each of the discriminator's two, of five pieces each.
        loss: Of the game.

    Raises:
        UsageError: A size is less than 1.
    """

    d: int = 100
    width: int = 1200
    maxout: int = 240
    loss: str = "non-saturating"
    conditional = False
    prior = "uniform"
    paper = "Goodfellow et al. 2014"

    def __post_init__(self) -> None:
        for name in ("d", "width", "maxout"):
            check_whole(f"mlp: {name}", getattr(self, name), 1)

    def generator(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The generator, (N, d) to (N, *shape) in [0, 1]."""
        size, w = math.prod(shape), self.width
        layers = [nn.Linear(self.d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, size), nn.Sigmoid()]
        return nn.Sequential(*layers, nn.Unflatten(1, shape))

    def discriminator(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The discriminator, (N, *shape) to scores (N,)."""
        size, w = math.prod(shape), self.maxout
        layers = [nn.Dropout(0.2), Maxout(size, w, 5), nn.Dropout(0.5), Maxout(w, w, 5), nn.Dropout(0.5)]
        return Scored(nn.Sequential(nn.Flatten(), *layers), nn.Linear(w, 1))
