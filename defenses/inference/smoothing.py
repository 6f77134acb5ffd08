"""The mean answer over Gaussian noise on the input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advkit import spec
from advkit.defenses.inference.defended import Random, adaptive
from advkit.engine import Attack
from advkit.oracle import logits_of


@dataclass(frozen=True)
class Smoothing:
    """log (1/n sum_i softmax(f(x + sigma * g_i))), with g_i standard normal, drawn anew for each input and call.

    Cohen, Rosenfeld and Kolter, 2019, "Certified adversarial robustness via randomized smoothing",
    https://arxiv.org/abs/1902.02918, count answers; the mean of probabilities is what Salman et al., 2019, "Provably robust
    deep learning via adversarially trained smoothed classifiers", https://arxiv.org/abs/1906.04584, attack. It has a gradient,
    so an adaptive attack takes the mean over draws. A network should be trained with such noise.

    Arguments:
        sigma: The deviation of the noise, in the units of the data.
        n: How many draws an answer is the mean of.
        seed: Of the noise.

    Raises:
        UsageError: A setting is not greater than 0, or the seed less than 0.
    """

    sigma: float = 0.25
    n: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        spec.check_positive("smoothing: sigma", self.sigma)
        spec.check_whole("smoothing: n", self.n, 1)
        spec.check_whole("smoothing: seed", self.seed, 0)

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """The mean of the model's answers."""
        return Smoothed(self, model)


class Smoothed(Random):
    """The mean of a model's answers over noise.

    Arguments:
        settings: The noise.
        model: Inputs (N, *) to logits (N, K).
    """

    def __init__(self, settings: Smoothing, model: Callable[[Tensor], Any]) -> None:
        super().__init__(settings.seed, 4)
        self.settings, self.model = settings, model

    def forward(self, x: Tensor) -> Tensor:
        """The logarithm of the mean probabilities, with shape (N, K)."""
        rng, n = self.dice.throw(x), self.settings.n
        noisy = (x + self.settings.sigma * rng.normal(*x.shape[1:], dtype=x.dtype) for _ in range(n))
        said = torch.stack([logits_of(self.model(z)).log_softmax(1) for z in noisy])
        return said.logsumexp(0) - math.log(n)

    def adaptive(self, attack: Attack) -> Attack:
        """The attack that knows of the defense."""
        return adaptive(self, attack)

    def extra_repr(self) -> str:
        """The settings."""
        return repr(self.settings)
