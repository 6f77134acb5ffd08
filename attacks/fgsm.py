"""The fast gradient sign method.

Symbols: g is the gradient of the loss at x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from advkit.losses import LOSSES
from advkit.oracle import Access, Oracle
from advkit.spec import check_choice
from advkit.streams import Streams
from advkit.threat import Lp


@dataclass(frozen=True)
class FGSM:
    r"""x + eps * argmax over ||v||_p <= 1 of <v, g>, clipped to the range; for l_inf, x + eps * sign(g).

    The step does not know the range: in l_1, where it moves one entry, clipping that entry can undo most of it.

    Goodfellow, Shlens and Szegedy, 2015, "Explaining and harnessing adversarial examples",
    https://arxiv.org/abs/1412.6572.

    Arguments:
        loss: What is maximized, by its name.
    """

    loss: str = "ce"
    access = Access.GRADIENTS
    norms = (math.inf, 2.0, 1.0)
    minimum = False
    paper = "Goodfellow et al. 2015"
    cost = 2

    def __post_init__(self) -> None:
        check_choice("fgsm: loss", self.loss, LOSSES)

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """One step, with shape (N, *)."""
        _, g = oracle.grad(x, LOSSES[self.loss])
        return threat.project(x + threat.eps * threat.steepest(g), x)
