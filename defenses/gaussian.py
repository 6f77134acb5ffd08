"""Training with Gaussian noise, for randomized smoothing.

Symbols: sigma is the standard deviation of the noise, in the units of the data; N(0, I) the standard normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.oracle import logits_of
from advkit.spec import check_positive


@dataclass(frozen=True)
class GaussianTraining:
    r"""The cross entropy at x + sigma * n, where n ~ N(0, I) is drawn anew for each input and step.

    Cohen, Rosenfeld and Kolter, 2019, "Certified adversarial robustness via randomized smoothing",
    https://arxiv.org/abs/1902.02918: a network that is right under noise is what :class:`Smoothing
    <advkit.defenses.certificates.smoothing.Smoothing>` can certify. The noisy input is not clipped to the range of the data,
    as it is not when the network is smoothed.

    Arguments:
        sigma: The standard deviation; the same as that of the certificate.

    Raises:
        UsageError: sigma is not greater than 0.
    """

    sigma: float = 0.5

    def __post_init__(self) -> None:
        check_positive("gaussian: sigma", self.sigma)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float = 1.0) -> Tensor:
        """The mean over the batch, with shape ()."""
        noise = torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype)
        return F.cross_entropy(logits_of(model(x + self.sigma * noise.to(x.device))), y)
