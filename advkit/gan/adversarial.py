"""The game itself: drawings against data, judged by one of the losses.

Symbols: x is a batch of data in [0, 1], (N, *), y its classes; G(z, y) are drawings, D their scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.errors import UsageError
from advkit.gan.losses import GameLoss, matched, told_apart
from advkit.gan.source import PRIORS


class Adversarial:
    """A generator and a discriminator of one of the tables' networks.

    Arguments:
        settings: The networks: :class:`advkit.gan.dcgan.DCGAN` or the like.
        generator: The generator.
        discriminator: The discriminator.
        loss: The loss of both.

    Raises:
        UsageError: The loss has a gradient penalty and the discriminator batch normalization.
    """

    def __init__(self, settings: Any, generator: nn.Module, discriminator: Any, loss: GameLoss) -> None:
        self.settings, self.generator, self.discriminator, self.loss = settings, generator, discriminator, loss
        # One that matches hidden units goes on when the scores tell it nothing.
        self.evenly = not loss.match
        if loss.penalty and any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in discriminator.modules()):
            name = type(settings).__name__.lower()
            raise UsageError(
                f"the loss has a gradient penalty and {name}'s discriminator batch normalization; use mlp or biggan"
            )

    def begin(self, x: Tensor) -> None:
        """Nothing is started from data."""

    def draw(self, n: int, y: Tensor, rng: torch.Generator) -> Tensor:
        """``n`` samples, with shape (n, *), of classes (n,) where the generator takes any."""
        z = PRIORS[self.settings.prior](n, self.settings.d, generator=rng).to(y.device)
        return self.generator(z, y) if self.settings.conditional else self.generator(z)

    def discriminate(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The discriminator's loss, with shape (), and the share of data and drawings that it tells apart."""
        d = self.discriminator
        with torch.no_grad():
            fake = self.draw(len(x), y, rng)
        # Apart, as each has its own statistics where there is batch normalization.
        hidden = d.features(x), d.features(fake)
        real, false = (d.score(f, y) for f in hidden)
        loss = self.loss.discriminator(real, false) + self._named(hidden[0], y)
        if self.loss.penalty:
            loss = loss + self.loss.penalty * self._penalty(x, fake, y, rng)
        return loss, told_apart(self.loss, real.detach(), false.detach())

    def generate(self, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """The generator's loss, with shape ()."""
        f = self.discriminator.features(self.draw(len(x), y, rng))
        if self.loss.match:
            with torch.no_grad():
                real = self.discriminator.features(x)
            return matched(real, f)
        return self.loss.generator(self.discriminator.score(f, y)) + self._named(f, y)

    def _named(self, f: Tensor, y: Tensor) -> Tensor | float:
        """The loss of an auxiliary classifier; 0 where there is none."""
        logits = self.discriminator.classify(f) if hasattr(self.discriminator, "classify") else None
        return 0.0 if logits is None else F.cross_entropy(logits, y)

    def _penalty(self, x: Tensor, fake: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """Mean (||grad D|| - 1)^2 at random points between data and drawings, with shape ()."""
        t = torch.rand(len(x), generator=rng).to(x).view(-1, *(1,) * (x.ndim - 1))
        between = torch.lerp(x, fake, t).requires_grad_(True)
        (g,) = torch.autograd.grad(self.discriminator(between, y).sum(), between, create_graph=True)
        return (g.flatten(1).norm(dim=1) - 1).square().mean()
