"""The semi-supervised game: a classifier of K classes that also tells drawings from data, and a generator that matches it.

Symbols: l(x) are the K logits of an image, Z(x) the sum of their exponentials; the discriminator's p(x is real) is
Z / (Z + 1), as if a drawing were a class of its own whose logit is 0. f(x) are the hidden units before the logits.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.gan.layers import Dense, MinibatchDiscrimination, Noise
from advkit.gan.losses import matched
from advkit.spec import check_whole

HIDDEN = (1000, 500, 250, 250, 250)
INK = 0.13
"""The share of a digit's pixels that are white."""


class Classifier(nn.Module):
    """Dense layers with normalized weights, noise before each, for (N, *) in [0, 1] and K classes.

    Arguments:
        inward: Entries of an input.
        classes: K.
        kernels: Of minibatch discrimination, for telling drawings from data; it never touches the logits, which belong to one
            input alone.
    """

    def __init__(self, inward: int, classes: int, kernels: int = 0) -> None:
        super().__init__()
        sizes = (inward, *HIDDEN)
        layers = [Dense(a, b) for a, b in itertools.pairwise(sizes)]
        self.hidden = nn.ModuleList(layers)
        self.noises = nn.ModuleList([Noise(0.3), *(Noise(0.5) for _ in layers)])
        self.top = Dense(sizes[-1], classes, scaled=True)
        self.beside = MinibatchDiscrimination(sizes[-1], kernels) if kernels else None
        self.weigh = Dense(kernels, 1, scaled=True) if kernels else None
        # The scales of hidden units are not learned; without data at hand, dots as many as a digit has serve to choose them.
        self.initialize((torch.rand(500, inward) < INK).float())

    def features(self, x: Tensor) -> Tensor:
        """f(x), with shape (N, 250)."""
        h = x.flatten(1)
        for noise, layer in zip(self.noises, self.hidden, strict=False):
            h = layer(noise(h)).relu()
        return h

    def logits(self, f: Tensor) -> Tensor:
        """l, with shape (N, K), of hidden units (N, 250)."""
        return self.top(self.noises[-1](f))

    def real(self, f: Tensor, logits: Tensor) -> Tensor:
        """The logit of p(x is real), log Z, with shape (N,)."""
        score = logits.logsumexp(1)
        return score if self.beside is None or self.weigh is None else score + self.weigh(self.beside(f)).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """l(x), with shape (N, K)."""
        return self.logits(self.features(x))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start from units of mean 0 and deviation 1 over a batch of data, (N, *)."""
        h = x.flatten(1)
        for noise, layer in zip(self.noises, self.hidden, strict=False):
            h = noise(h)
            assert isinstance(layer, Dense)
            layer.initialize(h)
            h = layer(h).relu()
        self.top.initialize(self.noises[-1](h))


@dataclass(frozen=True)
class SSGAN:
    """A classifier that learns from few labels and many images without, by telling drawings from both.

    Salimans, Goodfellow, Zaremba, Cheung, Radford and Chen, 2016, "Improved techniques for training GANs",
    https://arxiv.org/abs/1606.03498, with the networks of its MNIST experiment. The generator matches the mean of the
    discriminator's hidden units. What it draws is not pretty: it is the classifier that is wanted.

    Arguments:
        d: Entries of a code.
        width: Units of each of the generator's two hidden layers.
        minibatch: Kernels of minibatch discrimination; 0 for none. With some, the generator descends -log p(real)
            instead, which draws better and classifies worse.

    Raises:
        UsageError: A size is less than 1.
    """

    d: int = 100
    width: int = 500
    minibatch: int = 0
    conditional = False
    prior = "uniform"
    paper = "Salimans et al. 2016"

    def __post_init__(self) -> None:
        check_whole("ssgan: d", self.d, 1)
        check_whole("ssgan: width", self.width, 1)
        check_whole("ssgan: minibatch", self.minibatch, 0)

    def generator(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The generator, (N, d) to (N, *shape) in [0, 1]."""
        w, layers = self.width, []
        for inward in (self.d, w):
            norm = nn.BatchNorm1d(w)
            # A scale in front of another layer of weights is one too many.
            norm.weight.requires_grad_(False)
            layers += [nn.Linear(inward, w, bias=False), norm, nn.Softplus()]
        return nn.Sequential(*layers, Dense(w, math.prod(shape), scaled=True), nn.Sigmoid(), nn.Unflatten(1, shape))

    def discriminator(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The classifier, (N, *shape) to logits (N, classes)."""
        return Classifier(math.prod(shape), classes, self.minibatch)


class SemiSupervised:
    """The game of a classifier with few labels and a generator, on inputs in [0, 1].

    Arguments:
        settings: The networks.
        generator: The generator.
        discriminator: The classifier.
        x: The inputs that have labels, with shape (L, *), in [0, 1].
        y: Their labels, with shape (L,) and dtype int64.
    """

    evenly = False

    def __init__(self, settings: SSGAN, generator: nn.Module, discriminator: Any, x: Tensor, y: Tensor) -> None:
        self.settings, self.generator, self.discriminator, self.x, self.y = settings, generator, discriminator, x, y

    def begin(self, x: Tensor) -> None:
        """Start the classifier from a batch of data, (N, *)."""
        self.discriminator.initialize(x)

    def draw(self, n: int, y: Tensor, rng: torch.Generator) -> Tensor:
        """``n`` samples, with shape (n, *)."""
        return self.generator(torch.rand(n, self.settings.d, generator=rng).to(y.device))

    def discriminate(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The classifier's loss, with shape (), and the share of x and of drawings that it tells apart; y is not used."""
        chosen = torch.randperm(len(self.x), generator=rng)[: len(x)]
        with torch.no_grad():
            fake = self.draw(len(x), y, rng)
        c, parts = self.discriminator, [len(chosen), len(x), len(x)]
        f = c.features(torch.cat([self.x[chosen].to(x), x, fake]))
        logits = c.logits(f).split(parts)
        real, false = (c.real(*pair) for pair in list(zip(f.split(parts), logits, strict=True))[1:])
        told = 0.5 * ((real > 0).float().mean() + (false <= 0).float().mean())
        named = F.cross_entropy(logits[0], self.y[chosen].to(y.device))
        return named + 0.5 * (F.softplus(-real).mean() + F.softplus(false).mean()), told.detach()

    def generate(self, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """The generator's loss, with shape (): ||mean f(x) - mean f(G(z))||^2 / F, or -mean log p(G(z) is real)."""
        f = self.discriminator.features(self.draw(len(x), y, rng))
        if self.settings.minibatch:
            return F.softplus(-self.discriminator.real(f, self.discriminator.logits(f))).mean()
        with torch.no_grad():
            real = self.discriminator.features(x)
        return matched(real, f)
