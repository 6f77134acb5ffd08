"""Where an adversary may go, as bounds need it: a box, and the least of a linear function.

Symbols: a ball ||z - x||_p <= eps inside [low, high]; q is the dual norm's, 1/p + 1/q = 1; A are coefficients, (N, K, *).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit import norms
from advkit.errors import UsageError
from advkit.threat import Change, Lp


@dataclass(frozen=True)
class Region:
    """The inputs that a threat model allows, and the few more that rounding lets ``allows`` accept.

    Attributes:
        x: The centres, with shape (N, *).
        p: The norm: 1, 2 or inf.
        eps: The radius, with shape (N, 1).
        low: The least value of each entry, with shape (N, *).
        high: The greatest.
    """

    x: Tensor
    p: float
    eps: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, x: Tensor, threat: Lp, dtype: torch.dtype | None = None) -> Region:
        """The region of inputs of shape (N, *), in a precision; by default that of x.

        Raises:
            UsageError: The threat model is not a ball of l_inf, l_2 or l_1 with a radius.
        """
        check_ball(threat)
        # Lp.allows adds to the radius half a unit in the last place of each entry of x + d; one entry may use it all.
        half = torch.finfo(x.dtype).eps / 2 * (x.abs() + threat.eps)
        eps = threat.eps * (1 + 1e-6) + norms.lp_norm(half, threat.p).unsqueeze(1).to(dtype or x.dtype)
        # In the data's own type: 0.9 as a float32 may be greater than 0.9.
        low, high = torch.tensor([threat.low, threat.high], dtype=x.dtype).tolist()
        x = x.to(eps.dtype)
        room = eps.view(-1, *(1,) * (x.ndim - 1))
        return cls(x, threat.p, eps, (x - room).clamp(min=low), (x + room).clamp(max=high))

    def least(self, a: Tensor) -> Tensor:
        """The least of A z in the region, or a little less, with shape (N, K).

        In l_inf it is exact. In l_2 and l_1 it is the better of A x - eps ||A||_q and the least in the box around the ball.
        """
        a = a.flatten(2)
        mu, r = ((end.flatten(1).unsqueeze(2)) for end in ((self.high + self.low) / 2, (self.high - self.low) / 2))
        box = (a @ mu - a.abs() @ r).squeeze(2)
        if self.p == math.inf:
            return box
        dual = torch.linalg.vector_norm(a, norms.dual(self.p), dim=2)
        return torch.maximum(box, (a @ self.x.flatten(1).unsqueeze(2)).squeeze(2) - self.eps * dual)

    def corner(self, a: Tensor) -> Tensor:
        """Where A z is least, with shape (N, K, *): up to rounding an allowed input, which ``Lp.project`` makes one.

        In l_2 and l_1 it is the ball's own least point, clipped to the range.
        """
        low, high = self.low.unsqueeze(1), self.high.unsqueeze(1)
        if self.p == math.inf:
            return torch.where(a > 0, low, high)
        away = norms.steepest(a.flatten(0, 1), self.p).view_as(a)
        eps = self.eps.view(-1, *(1,) * (a.ndim - 1))
        return torch.minimum(torch.maximum(self.x.unsqueeze(1) - eps * away, low), high)


def check_ball(threat: Lp | Change) -> None:
    """Refuse a threat model that has no linear bounds.

    Raises:
        UsageError: It is not a ball of l_inf, l_2 or l_1 with a radius.
    """
    if not isinstance(threat, Lp) or threat.p == 0:
        name = norms.norm_name(threat.p) if isinstance(threat, Lp) else type(threat).__name__
        raise UsageError(f"the threat model is {name}; bounds serve l_inf, l_2 and l_1")
    if threat.eps > torch.finfo(torch.float32).max:
        raise UsageError("the threat model has no radius that a float32 can hold; bounds need one, as in linf(0.1)")
