"""PDPGD: a gradient step on the loss, a proximal step on the norm, and a multiplier that weighs the two.

Symbols: delta is the perturbation, L the margin (positive where the model is fooled), m and s the moments of Adam, h the scale
that Adam gives each entry, eta the step, w the weight of the loss and 1 - w that of the norm, mu the logarithm of w / (1 - w).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.losses import margin
from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

BETA_1, BETA_2 = 0.9, 0.999
"""How fast Adam's moments forget."""
FIRST, MOST = math.log(100), math.log(1e6)
"""The first mu, and the greatest size of mu."""
LAST = 0.01
"""The last eta, as a share of the first, which it falls to geometrically."""
DUAL, LAST_DUAL = 0.1, 0.01
"""The first step of mu, and the last, which it falls to linearly."""
MEMORY = 0.9
"""What of w stays from one step to the next."""
LONGEST = 5.0
"""The greatest threshold of an entry, as a multiple of that of the entry with the greatest h."""


@dataclass(frozen=True)
class PDPGD:
    r"""Adam on softplus(-L), then the proximal step of the norm, sign(delta) * max(|delta| - t, 0); mu follows the sign of -L.

    t = eta * (1 - w) / w / h: the closed form of the proximal step in Adam's scale, which the paper iterates. Where h is small
    it is held at five times the least t of the row, about where five of the paper's iterations end; an entry would otherwise be
    lost for having a small gradient once. Here the norm is l_1, where the paper's attack is the strongest of its kind.

    Matyasko and Chau, 2021, "PDPGD: primal-dual proximal gradient descent adversarial attack",
    https://arxiv.org/abs/2106.01538.

    Arguments:
        steps: How many gradients are taken.
        lr: The first eta, as a share of the data's range (of 1 where the range is not finite).
    """

    steps: int = 500
    lr: float = 0.3
    access = Access.GRADIENTS
    norms = (1.0,)
    minimum = True
    paper = "Matyasko and Chau 2021"

    def __post_init__(self) -> None:
        check_whole("pdpgd: steps", self.steps, 1)
        check_positive("pdpgd: lr", self.lr)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        width = threat.high - threat.low
        lr = self.lr * (width if width < math.inf else 1.0)
        x_t, m, s = x, torch.zeros_like(x), torch.zeros_like(x)
        mu = torch.full((len(x),), FIRST, dtype=x.dtype, device=x.device)
        w = mu.sigmoid()
        for k in range(self.steps):
            L, g = oracle.grad(x_t, _softplus)
            m, s = m.lerp(-g, 1 - BETA_1), s.lerp(g * g, 1 - BETA_2)
            h = (s / (1 - BETA_2 ** (k + 1))).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
            eta, top = lr * LAST ** (k / self.steps), lp_norm(h, math.inf)
            delta = (x_t - eta / (1 - BETA_1 ** (k + 1)) * m / h).clamp(threat.low, threat.high) - x
            t = per_row(eta * (1 - w) / w / top, x) * (per_row(top, x) / h).clamp(max=LONGEST)
            x_t = (x + delta.sign() * (delta.abs() - t).clamp(min=0.0)).clamp(threat.low, threat.high)
            mu = (mu - (DUAL + (LAST_DUAL - DUAL) * k / self.steps) * L.sign()).clamp(-MOST, MOST)
            w = w.lerp(mu.sigmoid(), 1 - MEMORY)
        return x_t


def _softplus(outputs: Tensor, y: Tensor) -> Tensor:
    """The margin, with the gradient of -softplus(-L)."""
    L = margin(outputs, y)
    loss = -F.softplus(-L)
    return L.detach() + (loss - loss.detach())
