"""Conditional residual networks with spectral norms and self-attention, for small images.

Symbols: z is a code, (N, d), standard normal, which also steers the generator's normalization; y a class, (N,); x an image,
(N, C, H, W), in [0, 1].

In two things this differs from the papers, as small images in a few thousand steps showed that it must
(``docs/measurements.md``). The class enters the generator's first layer only: where it steers the normalization too, each class
is soon drawn in one way. And the discriminator, whose ReLU leaks, judges its last maps place by place, not their sum.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from advkit.gan.dcgan import Centred, halvings
from advkit.gan.layers import ConditionalNorm, SelfAttention
from advkit.spec import check_choice, check_whole

CLASS, SMALL = 32, 0.3
"""Entries of a class's embedding in the generator, and their first deviation: at 1 the class would outshout the code."""
SLOPE = 0.2
"""Of the discriminator's leaky ReLU."""

JUDGES = {
    "projection": "the score has a part that is an inner product of the class and the hidden units",
    "classifier": "a second head names the class",
}


def _conv(inward: int, outward: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inward, outward, size, padding=size // 2)


def _leaky(h: Tensor) -> Tensor:
    return F.leaky_relu(h, SLOPE)


class Up(nn.Module):
    """A residual block that doubles the resolution, normalized by the code.

    Arguments:
        inward: Channels of the input.
        outward: Channels of the output.
        code: Entries of z.
    """

    def __init__(self, inward: int, outward: int, code: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = ConditionalNorm(inward, code), ConditionalNorm(outward, code)
        self.conv_1, self.conv_2, self.skip = _conv(inward, outward), _conv(outward, outward), _conv(inward, outward, 1)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """(N, inward, H, W) to (N, outward, 2 H, 2 W)."""
        out = self.conv_1(F.interpolate(self.norm_1(h, z).relu(), scale_factor=2))
        out = self.conv_2(self.norm_2(out, z).relu())
        # A 1 x 1 convolution gives the same before and after the doubling.
        return out + F.interpolate(self.skip(h), scale_factor=2)


class Down(nn.Module):
    """A residual block that halves the resolution, or leaves it.

    Arguments:
        inward: Channels of the input.
        outward: Channels of the output.
        first: Whether the input is the image, which is not rectified.
        part: How many pixels of each side become one: 2, or 1.
    """

    def __init__(self, inward: int, outward: int, first: bool = False, part: int = 2) -> None:
        super().__init__()
        self.first, self.part = first, part
        self.conv_1, self.conv_2, self.skip = (
            spectral_norm(_conv(*sizes)) for sizes in ((inward, outward), (outward, outward), (inward, outward, 1))
        )

    def forward(self, h: Tensor) -> Tensor:
        """(N, inward, H, W) to (N, outward, H / part, W / part)."""
        out = self.conv_2(_leaky(self.conv_1(h if self.first else _leaky(h))))
        return F.avg_pool2d(out, self.part) + self.skip(F.avg_pool2d(h, self.part))


class Generator(nn.Module):
    """Residual blocks upwards from a code, (N, d) and classes (N,) to (N, C, H, W) in [0, 1].

    Arguments:
        settings: The sizes.
        shape: (C, H, W).
        classes: How many there are.
    """

    def __init__(self, settings: BigGAN, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        n, height, width = halvings(shape, "biggan")
        sizes = [settings.width * 2**i for i in reversed(range(n + 1))]
        self.embed = nn.Embedding(classes, CLASS)
        nn.init.normal_(self.embed.weight, 0.0, SMALL)
        self.first = nn.Linear(settings.d + CLASS, sizes[0] * height * width)
        self.start = (sizes[0], height, width)
        self.blocks = nn.ModuleList(Up(a, b, settings.d) for a, b in itertools.pairwise(sizes))
        self.attention = SelfAttention(sizes[-2]) if settings.attention else None
        self.norm, self.last = nn.BatchNorm2d(sizes[-1]), _conv(sizes[-1], shape[0])

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Images, with shape (N, C, H, W)."""
        h = self.first(torch.cat([z, self.embed(y)], 1)).unflatten(1, self.start)
        for i, block in enumerate(self.blocks):
            if self.attention is not None and i == len(self.blocks) - 1:
                h = self.attention(h)
            h = block(h, z)
        return self.last(self.norm(h).relu()).sigmoid()


class Discriminator(nn.Module):
    """Residual blocks downwards, (N, C, H, W) and classes (N,) to scores (N,).

    Arguments:
        settings: The sizes.
        shape: (C, H, W).
        classes: How many there are.
    """

    def __init__(self, settings: BigGAN, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        n, height, width = halvings(shape, "biggan")
        sizes = [settings.width * 2**i for i in range(n)]
        downs = itertools.pairwise([shape[0], *sizes])
        blocks = [Down(a, b, first=not i) for i, (a, b) in enumerate(downs)]
        attention = [SelfAttention(sizes[0])] if settings.attention else []
        # Channels are cheap where maps are small.
        self.body = nn.Sequential(Centred(), blocks[0], *attention, *blocks[1:], Down(sizes[-1], 4 * sizes[-1], part=1))
        units = 4 * sizes[-1] * height * width
        self.linear = spectral_norm(nn.Linear(units, 1))
        projection = settings.judge == "projection"
        self.embed = spectral_norm(nn.Embedding(classes, units)) if projection else None
        self.name = None if projection else nn.Linear(units, classes)

    def features(self, x: Tensor) -> Tensor:
        """The hidden units, with shape (N, F)."""
        return _leaky(self.body(x)).flatten(1)

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """The scores of hidden units, with shape (N,): with projection, as pictures of the classes y."""
        score = self.linear(f).squeeze(1)
        return score if self.embed is None else score + (self.embed(y) * f).sum(1)

    def classify(self, f: Tensor) -> Tensor | None:
        """The logits of the classes, with shape (N, K), where there is a head for them."""
        return None if self.name is None else self.name(f)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The scores of images (N, C, H, W), with shape (N,)."""
        return self.score(self.features(x), y)


@dataclass(frozen=True)
class BigGAN:
    """Residual blocks with spectral norms; the code steers the generator's normalization, the class the discriminator's score.

    Brock, Donahue and Simonyan, 2019, "Large scale GAN training for high fidelity natural image synthesis",
    https://arxiv.org/abs/1809.11096, scaled to small images. The projection is that of Miyato and Koyama, 2018,
    https://arxiv.org/abs/1802.05637, the auxiliary classifier that of Odena, Olah and Shlens, 2017,
    https://arxiv.org/abs/1610.09585.

    Arguments:
        d: Entries of a code.
        width: Channels at full resolution; each halving has twice as many.
        judge: How the discriminator takes the class: ``projection`` or ``classifier``.
        attention: Whether both have a layer of self-attention at half the resolution.
        loss: Of the game.

    Raises:
        UsageError: A size is less than 1, or the judge is unknown.
    """

    d: int = 64
    width: int = 8
    judge: str = "projection"
    attention: bool = False
    loss: str = "hinge"
    conditional = True
    prior = "normal"
    paper = "Brock et al. 2019"

    def __post_init__(self) -> None:
        check_whole("biggan: d", self.d, 1)
        check_whole("biggan: width", self.width, 1)
        check_choice("biggan: judge", self.judge, JUDGES)

    def generator(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The generator, (N, d) and (N,) to (N, C, H, W) in [0, 1].

        Raises:
            UsageError: Images of this shape cannot be halved.
        """
        return Generator(self, shape, classes)

    def discriminator(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The discriminator, (N, C, H, W) and (N,) to scores (N,).

        Raises:
            UsageError: Images of this shape cannot be halved.
        """
        return Discriminator(self, shape, classes)
