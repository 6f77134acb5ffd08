"""Diverse inputs: gradients through a random resize and pad.

Symbols: p is the probability of a change, r the new length of an axis of length n, A the n x n matrix that resizes an axis to r
entries and pads it to n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.combine import Lens, Wrapper
from advkit.engine import Attack
from advkit.errors import UsageError
from advkit.losses import Loss
from advkit.oracle import Oracle, Through
from advkit.spec import check_positive
from advkit.streams import Streams
from advkit.surrogates import check_gradients
from advkit.threat import Lp


class _Diverse(Lens):
    """The oracle, with gradients through another resize and pad at every call."""

    def __init__(self, oracle: Oracle, attack: DI, fill: float, rng: Streams) -> None:
        super().__init__(oracle)
        self.attack, self.fill, self.rng = attack, fill, rng

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of the changed candidates, and its gradient in the candidates."""
        # Whether, how small, and where on the last two axes; for every row, so that all streams stay in step.
        u = self.rng.uniform(4, dtype=x_adv.dtype)

        def changed(z: Tensor, who: Tensor) -> Tensor:
            z = (z if through is None else through(z, who)) - self.fill
            apply, size, left, top = u[who].unbind(1)
            least = torch.where(apply < self.attack.p, self.attack.least, 1.0)
            channels = z.reshape(len(z), -1, *z.shape[-2:] if z.ndim > 3 else (1, z.shape[-1]))
            channels = channels @ _resized(z.shape[-1], least, size, left).mT.unsqueeze(1)
            if z.ndim > 3:
                channels = _resized(z.shape[-2], least, size, top).unsqueeze(1) @ channels
            return channels.view_as(z) + self.fill

        return self.oracle.grad(x_adv, loss, rows, towards=towards, through=changed)


def _resized(n: int, least: Tensor, size: Tensor, place: Tensor) -> Tensor:
    """A for each row, with shape (N, n, n): to r entries from ``least * n`` to n - 1 by ``size``, put by ``place``.

    Where ``least`` is 1, the identity. Entries between two old ones are interpolated; those outside are 0.
    """
    smallest = (least * n).floor().clamp(min=1.0)
    r = (smallest + (size * (n - smallest)).floor()).unsqueeze(1)
    begin = (place.unsqueeze(1) * (n - r + 1)).floor()
    index = torch.arange(n, device=size.device, dtype=size.dtype)
    inside = (index >= begin) & (index < begin + r)
    source = ((index - begin + 0.5) * n / r - 0.5).clamp(0, n - 1)
    weights = (1.0 - (source.unsqueeze(2) - index).abs()).clamp(min=0.0)
    return weights * inside.unsqueeze(2)


@dataclass(frozen=True)
class DI(Wrapper):
    r"""The attack with gradients of L(resize and pad(x)), with probability p at each step, in place of those of L(x).

    Xie, Zhang, Zhou, Bai, Wang, Ren and Yuille, 2019, "Improving transferability of adversarial examples with input diversity",
    https://arxiv.org/abs/1803.06978. There images grow; here they shrink and are padded to their own size with 0 (or the end of
    the range that is closest to it), as networks may take one size only. Images change in height and width, an input of shape
    (N, D) or (N, C, T) in its last axis. What a row draws is its own.

    Arguments:
        attack: An attack with gradients.
        p: The probability of a change.
        least: The least share of each axis that is left, in (0, 1].
    """

    attack: Attack
    p: float = 0.5
    least: float = 0.9
    paper = "Xie et al. 2019"

    def __post_init__(self) -> None:
        check_gradients("di", self.attack)
        for name in ("p", "least"):
            check_positive(f"di: {name}", getattr(self, name))
            if getattr(self, name) > 1:
                raise UsageError(f"di: {name} is {getattr(self, name)}; it should be at most 1")

    @property
    def cost(self) -> int:
        """The attack's."""
        return self.attack.cost

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The attack's last iterate, with shape (N, *)."""
        fill = min(max(0.0, threat.low), threat.high)
        return self.attack(_Diverse(oracle, self, fill, rng), x, threat, rng)
