"""Certified training with linear bounds of the margins over intervals of the layers.

Symbols: m_I are the margins' bounds by intervals, m_C those by linear bounds, and beta is the share of m_C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.defenses.certificates import ibp
from advkit.defenses.certificates.crown import backward
from advkit.defenses.certificates.layers import Network
from advkit.defenses.certificates.region import Region
from advkit.defenses.ibp import check_schedule, initialize, worst_loss
from advkit.threat import Lp


@dataclass(frozen=True)
class CrownIBPTraining:
    r"""The worst cross entropy of the bounds beta m_C + (1 - beta) m_I, with beta from 1 to 0 as the radius grows.

    Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning and Hsieh, 2020, "Towards stable and efficient training of verifiably
    robust neural networks", https://arxiv.org/abs/1906.06316. The rest is as in :class:`~advkit.defenses.ibp.IBPTraining`.

    Arguments:
        threat: A ball with a radius.
        warm: The share of the training with the clean loss alone.
        ramp: The share over which the radius then grows from 0.
        kappa: The share of the clean loss at the end, to which it falls from 1 as the radius grows; 0 for none at any time.
        weight: Of the regularizer, which fades as the radius grows.

    Raises:
        UsageError: A threat model that bounds do not serve, or shares that do not fit.
    """

    threat: Lp
    warm: float = 0.02
    ramp: float = 0.4
    kappa: float = 0.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_schedule(self)

    @property
    def settled(self) -> float:
        """The share of the training after which the radius has its full size."""
        return self.warm + self.ramp

    def prepare(self, model: nn.Module, rng: torch.Generator) -> None:
        """Draw the weights anew, as :func:`~advkit.defenses.ibp.initialize` does."""
        initialize(model, rng)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float = 1.0) -> Tensor:
        """The mean over the batch, with shape ()."""
        return worst_loss(self, model, x, y, at, _margins)


def _margins(network: Network, region: Region, found: list[ibp.Interval], c: Tensor, share: float) -> Tensor:
    by_intervals = ibp.margins(network, found, c)
    if share == 1:
        return by_intervals
    a, b = backward(network, len(network.nodes) - 1, c, found)
    return (1 - share) * (region.least(a) + b) + share * by_intervals
