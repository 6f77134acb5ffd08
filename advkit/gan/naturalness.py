"""Do adversarial examples still show what they should? No norm says; others than the attacked model do.

Symbols: x are inputs and y their labels, z adversarial examples that were made of some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.engine import frozen
from advkit.errors import UsageError
from advkit.gan.pair import Pair
from advkit.models import Model
from advkit.oracle import answer

BATCH = 250
"""How many inputs are judged at a time."""
QUANTILE = 0.05
"""The share of the data whose scores are below the threshold."""


@dataclass(frozen=True, eq=False)
class Opinion:
    """What one classifier says of adversarial examples that were not made against it.

    Attributes:
        judge: Its name.
        digest: Of its weights.
        clean: How many of the inputs that the examples were made of it gets right.
        sees: Which of the examples it still calls by the label, with shape (N,).
        fooled: How many it calls what the attacked model does.
    """

    judge: str
    digest: str
    clean: int
    sees: Tensor
    fooled: int

    @property
    def label(self) -> int:
        """How many of the examples it still calls by the label."""
        return int(self.sees.sum())

    @property
    def of(self) -> int:
        """How many examples there are."""
        return len(self.sees)


def together(opinions: Sequence[Opinion]) -> int:
    """How many of the examples every judge still calls by the label."""
    return int(torch.stack([one.sees for one in opinions]).all(0).sum())


def opinion(judge: Model, x: Tensor, z: Tensor, y: Tensor, said: Tensor) -> Opinion:
    """What a classifier says of adversarial examples.

    Arguments:
        judge: The classifier, on the device of the examples.
        x: The inputs that the examples were made of, with shape (N, *).
        z: The examples, with shape (N, *).
        y: The labels, with shape (N,).
        said: What the attacked model says of z, with shape (N,).

    Raises:
        ModelError: The classifier does not take such inputs.
    """
    clean, adversarial = (_answers(judge, seen) for seen in (x, z))
    right, fooled = int((clean == y).sum()), int((adversarial == said).sum())
    return Opinion(judge.name, judge.digest, right, adversarial == y, fooled)


def _answers(judge: Model, x: Tensor) -> Tensor:
    """The classes that a classifier gives, with shape (N,)."""
    with torch.no_grad(), frozen(judge.module):
        return torch.cat([answer(judge.module, part).argmax(1) for part in x.split(BATCH)])


@dataclass(frozen=True)
class Scores:
    """What the discriminator of a generator thinks of adversarial examples.

    Attributes:
        threshold: What 95 % of the scores of data are above.
        examples: How many adversarial examples have a score above it.
        of_examples: How many there are.
        samples: How many plain samples of the generator have.
        of_samples: How many there are.
    """

    threshold: float
    examples: int
    of_examples: int
    samples: int
    of_samples: int


def scores(pair: Pair, x: Tensor, y: Tensor, z: Tensor, labels: Tensor, rng: torch.Generator) -> Scores:
    """The scores of adversarial examples beside those of data that the discriminator has not seen, and of plain samples.

    A discriminator tells apart what its own generator drew and data; of other pictures it may think anything.

    Arguments:
        pair: The generator and its discriminator.
        x: The data, with shape (M, *).
        y: Their labels, with shape (M,).
        z: The examples, with shape (N, *).
        labels: Their labels, with shape (N,).
        rng: Of the samples, as many as there are data, of their labels where the generator takes any.

    Raises:
        UsageError: The inputs are not of the shape that it draws.
    """
    if tuple(x.shape[1:]) != pair.shape:
        raise UsageError(f"the generator draws samples of shape {pair.shape} and the run has {tuple(x.shape[1:])}")
    drawn = pair.sample(len(x), y if pair.classes else None, rng)
    data, examples, samples = (_scored(pair, seen, of) for seen, of in ((x, y), (z, labels), (drawn, y)))
    threshold = float(data.double().quantile(QUANTILE))
    above, of_samples = (int((part > threshold).sum()) for part in (examples, samples))
    return Scores(threshold, above, len(z), of_samples, len(drawn))


def _scored(pair: Pair, x: Tensor, y: Tensor) -> Tensor:
    parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
    return torch.cat([pair.score(part, of if pair.settings.conditional else None) for part, of in parts])
