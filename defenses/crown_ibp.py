"""Certified training with linear bounds of the margins over intervals of the layers.

Symbols: m_I are the margins' bounds by intervals, m_C those by linear bounds, and beta is the share of m_C.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advkit.defenses.certificates import ibp
from advkit.defenses.certificates.crown import backward
from advkit.defenses.certificates.layers import Network
from advkit.defenses.certificates.region import Region
from advkit.defenses.ibp import IBPTraining


@dataclass(frozen=True)
class CrownIBPTraining(IBPTraining):
    r"""The worst cross entropy of the bounds beta m_C + (1 - beta) m_I, with beta from 1 to 0 as the radius grows.

    Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning and Hsieh, 2020, "Towards stable and efficient training of verifiably
    robust neural networks", https://arxiv.org/abs/1906.06316. The rest, and the
    settings, are those of :class:`~advkit.defenses.ibp.IBPTraining`.
    """

    def margins(self, network: Network, region: Region, found: list[ibp.Interval], c: Tensor, share: float) -> Tensor:
        """m, with shape (N, K - 1)."""
        by_intervals = super().margins(network, region, found, c, share)
        if share == 1:
            return by_intervals
        a, b = backward(network, len(network.nodes) - 1, c, found)
        return (1 - share) * (region.least(a) + b) + share * by_intervals
