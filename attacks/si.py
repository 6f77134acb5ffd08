"""Scale invariance: gradients averaged over copies of the input with less and less contrast.

Symbols: S_i(x) = x / 2^i is the i-th copy, m the number of copies.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advkit.combine import Lens, Wrapper
from advkit.engine import Attack
from advkit.losses import Loss
from advkit.oracle import Oracle, Through
from advkit.spec import check_whole
from advkit.streams import Streams
from advkit.surrogates import check_gradients
from advkit.threat import Lp


class _Scaled(Lens):
    """The oracle, with the mean over the copies in place of the loss and its gradient."""

    def __init__(self, oracle: Oracle, m: int) -> None:
        super().__init__(oracle)
        self.m = m

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of the copies, and its gradient."""
        values, g = self.oracle.grad(x_adv, loss, rows, towards=towards, through=through)
        for i in range(1, self.m):

            def scaled(z: Tensor, who: Tensor, i: int = i) -> Tensor:
                return (z if through is None else through(z, who)) / 2**i

            values_i, g_i = self.oracle.grad(x_adv, loss, rows, towards=towards, through=scaled)
            values, g = values + values_i, g + g_i
        return values / self.m, g / self.m


@dataclass(frozen=True)
class SI(Wrapper):
    r"""The attack with (1 / m) * sum_{i < m} of the gradients of L(x / 2^i) in place of that of L(x).

    Lin, Song, He, Wang and Hopcroft, 2020, "Nesterov accelerated gradient and scale invariance for adversarial attacks",
    https://arxiv.org/abs/1908.06281; ``si(ni-fgsm)`` is the paper's SI-NI-FGSM.

    Arguments:
        attack: An attack with gradients.
        m: How many copies.
    """

    attack: Attack
    m: int = 5
    paper = "Lin et al. 2020"

    def __post_init__(self) -> None:
        check_gradients("si", self.attack)
        check_whole("si: m", self.m, 1)

    @property
    def cost(self) -> int:
        """At most m times the attack's."""
        return self.m * self.attack.cost

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The attack's last iterate, with shape (N, *)."""
        return self.attack(_Scaled(oracle, self.m), x, threat, rng)
