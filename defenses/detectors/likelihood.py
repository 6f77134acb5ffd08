"""A likelihood ratio: how much better a model of spoilt inputs explains an input than a model of clean ones.

Symbols: p is the density of clean inputs, p_0 that of the same inputs with some entries replaced by noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.data import Data
from advkit.defenses.detectors.detector import batches
from advkit.errors import UsageError
from advkit.spec import check_positive

MOST = 12_288
"""How many numbers an input may have: 64 x 64 pixels of three colours. A covariance has the square of it."""


@dataclass(frozen=True)
class Likelihood:
    r"""The score is log p_0(x) - log p(x), where both densities are Gaussians with a full covariance.

    Ren, Liu, Fertig, Snoek, Poplin, DePristo, Dillon and Lakshminarayanan, 2019, "Likelihood ratios for out-of-distribution
    detection", https://arxiv.org/abs/1906.02845. Their densities are deep generative models; p_0, the background model, is, as
    here, of the same kind and fitted to inputs in which each entry is replaced by a uniform draw with probability mu. The ratio
    cancels what both have to explain, such as how much of an image is background. The classifier is not asked.

    Arguments:
        mu: The share of entries that are replaced for p_0.
        sigma: The standard deviation of noise that both densities allow each entry, as a share of the range of the data: what
            keeps a pixel that never changed from deciding all.

    Raises:
        UsageError: Mu is not between 0 and 1, or sigma not greater than 0.
    """

    mu: float = 0.1
    sigma: float = 0.003

    def __post_init__(self) -> None:
        if not 0 < self.mu < 1:
            raise UsageError(f"likelihood: mu is {self.mu}; it should be between 0 and 1")
        check_positive("likelihood: sigma", self.sigma)

    def fit(self, model: nn.Module, data: Data, rng: torch.Generator) -> nn.Module:
        """The fitted detector.

        Raises:
            UsageError: An input has too many entries for a covariance, or sigma is too small for these examples.
        """
        size = data.batch(0, 1)[0].numel()
        if size > MOST:
            raise UsageError(f"likelihood: an input of {data.name} has {size} entries; there should be at most {MOST}")
        x = torch.cat([z.flatten(1) for z, _ in batches(model, data)])
        noise = data.low + (data.high - data.low) * torch.rand(x.shape, generator=rng).to(x)
        mutated = torch.where(torch.rand(x.shape, generator=rng).to(x.device) < self.mu, noise, x)
        ridge = (self.sigma * (data.high - data.low)) ** 2
        return Ratio(gaussian(x, ridge), gaussian(mutated, ridge)).to(x.dtype)


def gaussian(x: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The mean (D,), the precision (D, D) and the logarithm of the greatest density, (), of a Gaussian fitted to x, (N, D).

    Arguments:
        x: The examples.
        ridge: What is added to the variance of each entry.

    Raises:
        UsageError: That is too little for the covariance to have an inverse in double precision.
    """
    wide = x.double()
    mean = wide.mean(0)
    off = wide - mean
    covariance = off.T @ off / len(x) + ridge * torch.eye(x.shape[1], dtype=wide.dtype, device=x.device)
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        raise UsageError("likelihood: sigma is so small that a covariance has no inverse; it should be greater, as 0.003 is")
    top = -lower.diagonal().log().sum() - x.shape[1] / 2 * math.log(2 * math.pi)
    return mean, torch.cholesky_inverse(lower), top


class Ratio(nn.Module):
    """The fitted detector, log p_0 - log p as one quadratic form: z^T A z / 2 + b^T z + c, z = x less the mean of p.

    Arguments:
        clean: Mean, precision and greatest logarithm of p.
        background: Those of p_0.
    """

    mean: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    def __init__(self, clean: tuple[Tensor, Tensor, Tensor], background: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__()
        (mean, precision, top), (mean_0, precision_0, top_0) = clean, background
        shift = mean_0 - mean
        self.register_buffer("mean", mean)
        self.register_buffer("a", precision - precision_0)
        self.register_buffer("b", precision_0 @ shift)
        self.register_buffer("c", top_0 - top - shift @ precision_0 @ shift / 2)

    def forward(self, x: Tensor) -> Tensor:
        """The scores, with shape (N,)."""
        z = x.flatten(1) - self.mean
        return ((z @ self.a) * z).sum(1) / 2 + z @ self.b + self.c
