"""sigma-zero.

Symbols: delta is the perturbation, in units of the data's range, L the margin (positive where the model is fooled), g the
gradient that delta descends, sigma how closely the smooth count of entries follows the true one, eta the step of Adam, annealed
from eta_0, m and v its moments, tau the threshold below which an entry of delta becomes 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

BETA_1, BETA_2 = 0.9, 0.999
"""The decay of Adam's moments."""
LAST = 0.1
"""The last eta, as a share of the first."""


@dataclass(frozen=True)
class SigmaZero:
    r"""Descend max(-L, 0) + mean_i delta_i^2 / (delta_i^2 + sigma), and set to 0 what is smaller than tau.

    The gradient is divided by its greatest entry and goes through Adam. tau grows by tau_step * eta where the model is fooled
    and falls by as much where it is not, so delta keeps crossing the boundary with fewer and fewer entries.

    Cina, Villani, Pintor, Schonherr, Biggio and Pelillo, 2025, "sigma-zero: gradient-based optimization of l_0-norm adversarial
    examples", https://arxiv.org/abs/2402.01879.

    Arguments:
        steps: How many gradients are taken.
        eta: eta_0, as a share of the data's range (of 1 where the range is not finite).
        sigma: The square of the change, in the same units, at which an entry counts as half of one.
        tau: The first threshold, in the same units.
        tau_step: How far tau moves in a step, as a share of eta.
    """

    steps: int = 100
    eta: float = 1.0
    sigma: float = 1e-3
    tau: float = 0.3
    tau_step: float = 0.01
    access = Access.GRADIENTS
    norms = (0.0,)
    minimum = True
    paper = "Cina et al. 2025"

    def __post_init__(self) -> None:
        check_whole("sigma-zero: steps", self.steps, 1)
        for name in ("eta", "sigma", "tau", "tau_step"):
            check_positive(f"sigma-zero: {name}", getattr(self, name))

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        width = threat.high - threat.low
        unit = width if width < math.inf else 1.0
        delta, m, v = (torch.zeros_like(x) for _ in range(3))
        tau = torch.full((len(x),), self.tau, dtype=x.dtype, device=x.device)
        for k in range(self.steps):
            L, up = oracle.grad(x + unit * delta, margin)
            square = delta.square()
            g = 2 * self.sigma / delta[0].numel() * delta / (square + self.sigma).square()
            g -= per_row((L <= 0).to(x.dtype) * unit, x) * up
            g /= per_row(lp_norm(g, math.inf).clamp(min=torch.finfo(g.dtype).tiny), g)
            m.lerp_(g, 1 - BETA_1)
            v.lerp_(g.square(), 1 - BETA_2)
            eta = self.eta * (LAST + (1 - LAST) * (1 + math.cos(math.pi * k / self.steps)) / 2)
            step = eta * math.sqrt(1 - BETA_2 ** (k + 1)) / (1 - BETA_1 ** (k + 1))
            delta = delta - step * m / (v.sqrt() + 1e-8)
            delta = ((x + unit * delta).clamp_(threat.low, threat.high) - x) / unit
            tau = (tau + self.tau_step * eta * torch.where(L > 0, 1.0, -1.0)).clamp(0.0, 1.0)
            delta = torch.where(delta.abs() < per_row(tau, delta), 0.0, delta)
        return x + unit * delta
