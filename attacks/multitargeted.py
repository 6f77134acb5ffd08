"""The multi-targeted attack: an attack with gradients, pushed to one class after the other.

Symbols: t is the class that a row is pushed to, z the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advkit.combine import Lens, Wrapper
from advkit.engine import Attack
from advkit.losses import Loss, towards_dlr, towards_margin
from advkit.oracle import Oracle, Through
from advkit.spec import check_choice, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

TOWARDS = {"margin": towards_margin, "dlr": towards_dlr}


class _Towards(Lens):
    """The oracle, with every loss replaced by one that pushes each row to a class of its own."""

    def __init__(self, oracle: Oracle, loss: Loss, t: Tensor) -> None:
        super().__init__(oracle)
        self.towards_loss, self.t = loss, t

    def loss(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> Tensor:
        """The loss towards t."""
        t = self.t if rows is None else self.t[rows]
        return self.oracle.loss(x_adv, self.towards_loss, rows, towards=t, through=through)

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss towards t, and its gradient."""
        t = self.t if rows is None else self.t[rows]
        return self.oracle.grad(x_adv, self.towards_loss, rows, towards=t, through=through)


@dataclass(frozen=True)
class MultiTargeted(Wrapper):
    r"""The attack with the loss z_t - z_y, for each of the n classes t that the model finds likeliest after y, in that order.

    Gowal, Uesato, Qin, Huang, Mann and Kohli, 2019, "An alternative surrogate loss for PGD-based adversarial testing",
    https://arxiv.org/abs/1910.09338. Around ``apgd`` with the loss ``dlr``, and n = 9, it is the targeted APGD of Croce and
    Hein, 2020, https://arxiv.org/abs/2003.01690. Where the goal is targeted, y is the target and t a class to leave behind.

    Arguments:
        attack: The attack; its own loss is not used.
        n: How many classes, at most; the rest is not tried.
        loss: ``margin`` or ``dlr``, its targeted form.
    """

    attack: Attack
    n: int = 9
    loss: str = "margin"
    paper = "Gowal et al. 2019"

    def __post_init__(self) -> None:
        check_whole("multi-targeted: n", self.n, 1)
        check_choice("multi-targeted: loss", self.loss, TOWARDS)

    @property
    def cost(self) -> int:
        """The clean input, and the attack and a look at its end for each class."""
        return 1 + self.n * (self.attack.cost + 1)

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate towards the last class, with shape (N, *); the oracle keeps the best of all."""
        x_adv = x
        for t in oracle.rivals(oracle.outputs(x), self.n).unbind(1):
            x_adv = self.attack(_Towards(oracle, TOWARDS[self.loss], t), x, threat, rng)
            oracle.fooled(x_adv)
        return x_adv
