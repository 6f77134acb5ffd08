"""The losses of the game between a generator and a discriminator.

Symbols: D(x) is the discriminator's score, high where x seems to be data; real are the scores of data, fake those of drawings.
Each loss has the discriminator's side, the generator's, and the score at which the discriminator cannot tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from advkit.spec import Table, check_at_least


class GameLoss(Protocol):
    """Both sides of a game; frozen data.

    ``match`` says that the generator matches hidden units, not scores; ``penalty`` is the weight of a gradient penalty on the
    discriminator, 0 for none.
    """

    @property
    def match(self) -> bool: ...  # noqa: D102
    @property
    def penalty(self) -> float: ...  # noqa: D102

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the discriminator descends, with shape (), of scores (N,) and (M,)."""

    def generator(self, fake: Tensor) -> Tensor:
        """What the generator descends, with shape (), of scores (M,)."""

    def middle(self, real: Tensor, fake: Tensor) -> Tensor:
        """The score, with shape (), above which the discriminator takes an input for data."""


class _Logits:
    """A score that is the logit of "this is data"."""

    match = False
    penalty = 0.0

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """-mean log sigmoid(real) - mean log(1 - sigmoid(fake))."""
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def middle(self, real: Tensor, fake: Tensor) -> Tensor:
        """0: both are as likely."""
        return real.new_zeros(())


@dataclass(frozen=True)
class Minimax(_Logits):
    """The generator descends mean log(1 - sigmoid(fake)): the discriminator's loss with the other sign.

    Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661. It is flat where the discriminator is sure.
    """

    def generator(self, fake: Tensor) -> Tensor:
        """Mean log(1 - sigmoid(fake))."""
        return -F.softplus(fake).mean()


@dataclass(frozen=True)
class NonSaturating(_Logits):
    """The generator descends -mean log sigmoid(fake), which is steep where the discriminator is sure.

    Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661.
    """

    def generator(self, fake: Tensor) -> Tensor:
        """-mean log sigmoid(fake)."""
        return F.softplus(-fake).mean()


@dataclass(frozen=True)
class FeatureMatching(_Logits):
    """The generator descends ||mean f(x) - mean f(G(z))||^2 / F, f the discriminator's F hidden units.

    Salimans et al., 2016, https://arxiv.org/abs/1606.03498.
    """

    match = True

    def generator(self, fake: Tensor) -> Tensor:
        """-mean log sigmoid(fake), for a discriminator without hidden units."""
        return F.softplus(-fake).mean()


@dataclass(frozen=True)
class LeastSquares:
    """Scores of data go to 1 and those of drawings to 0; the generator wants 1.

    Mao, Li, Xie, Lau, Wang and Smolley, 2017, "Least squares generative adversarial networks", https://arxiv.org/abs/1611.04076.
    """

    match = False
    penalty = 0.0

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """(mean (real - 1)^2 + mean fake^2) / 2."""
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())

    def generator(self, fake: Tensor) -> Tensor:
        """Mean (fake - 1)^2 / 2."""
        return 0.5 * (fake - 1).square().mean()

    def middle(self, real: Tensor, fake: Tensor) -> Tensor:
        """1/2."""
        return real.new_full((), 0.5)


@dataclass(frozen=True)
class Hinge:
    """Scores count until data have 1 and drawings -1; the generator wants them high without end.

    Lim and Ye, 2017, "Geometric GAN", https://arxiv.org/abs/1705.02894.
    """

    match = False
    penalty = 0.0

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Mean max(0, 1 - real) + mean max(0, 1 + fake)."""
        return (1 - real).relu().mean() + (1 + fake).relu().mean()

    def generator(self, fake: Tensor) -> Tensor:
        """-mean fake."""
        return -fake.mean()

    def middle(self, real: Tensor, fake: Tensor) -> Tensor:
        """0."""
        return real.new_zeros(())


@dataclass(frozen=True)
class Wasserstein:
    """Mean fake - mean real, the earth mover's distance where the discriminator's gradient has norm 1, for which it is fined.

    Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville, 2017, "Improved training of Wasserstein GANs",
    https://arxiv.org/abs/1704.00028. A discriminator with batch normalization has no gradient of one input alone, so it does
    not go with this loss.

    Arguments:
        penalty: The weight of the fine, mean (||grad D|| - 1)^2 at points between data and drawings.

    Raises:
        UsageError: The weight is negative.
    """

    penalty: float = 10.0
    match = False

    def __post_init__(self) -> None:
        check_at_least("wasserstein: penalty", self.penalty, 0)

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Mean fake - mean real."""
        return fake.mean() - real.mean()

    def generator(self, fake: Tensor) -> Tensor:
        """-mean fake."""
        return -fake.mean()

    def middle(self, real: Tensor, fake: Tensor) -> Tensor:
        """Halfway between the two means: a score has no zero."""
        return (real.mean() + fake.mean()) / 2


def matched(real: Tensor, fake: Tensor) -> Tensor:
    """||mean real - mean fake||^2 / F, with shape (), of hidden units (N, F) and (M, F)."""
    return (real.mean(0) - fake.mean(0)).square().mean()


def told_apart(loss: GameLoss, real: Tensor, fake: Tensor) -> Tensor:
    """The share of data and of drawings that are on their side of the middle, with shape (): 1/2 where nothing is told.

    >>> import torch
    >>> told_apart(NonSaturating(), torch.tensor([2.0, -1.0]), torch.tensor([-3.0, -3.0]))
    tensor(0.7500)
    """
    middle = loss.middle(real, fake)
    return 0.5 * ((real > middle).float().mean() + (fake <= middle).float().mean())


GAME_LOSSES: Table = {
    "minimax": Minimax,
    "non-saturating": NonSaturating,
    "least-squares": LeastSquares,
    "hinge": Hinge,
    "wasserstein": Wasserstein,
    "feature-matching": FeatureMatching,
}
"""The losses that a spec may name: ``wasserstein(penalty=10)``."""
