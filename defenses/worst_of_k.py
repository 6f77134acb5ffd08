"""Adversarial training with the worst of a few random changes.

Symbols: k is how many inputs are drawn for each x; x' is the one with the greatest loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit import norms
from advkit.defenses.adversary import Adversarial, check_adversary, ramped
from advkit.engine import perturb
from advkit.losses import ce
from advkit.oracle import Access, Oracle
from advkit.spec import check_whole
from advkit.streams import Streams
from advkit.threat import Change, Lp


@dataclass(frozen=True)
class _Draws:
    """The random input with the greatest loss, of k."""

    k: int
    access = Access.SCORES
    norms = (math.inf, 2.0, 1.0, 0.0)
    minimum = False
    paper = "Engstrom et al. 2019"

    def __post_init__(self) -> None:
        check_whole("worst-of-k: k", self.k, 1)

    @property
    def cost(self) -> int:
        """A forward pass a draw."""
        return self.k

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The worst, with shape (N, *)."""
        worst, most = x, torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
        for _ in range(self.k):
            z = threat.start(x, rng)
            values = oracle.loss(z, ce)
            worst, most = norms.where(values > most, z, worst), torch.maximum(values, most)
        return worst


@dataclass(frozen=True)
class WorstOfK(Adversarial):
    r"""The cross entropy at x', the worst of k inputs that are drawn at random from what the adversary may do.

    Engstrom, Tran, Tsipras, Schmidt and Madry, 2019, "Exploring the landscape of spatial robustness",
    https://arxiv.org/abs/1712.02779, where the changes are rotations and translations, of which gradients say little. Any
    threat model serves, but in a ball of many entries random inputs are weak.

    Arguments:
        threat: What the adversary may change.
        k: How many inputs are drawn for each example.
        ramp: The share of the training in which a radius grows to its full size; 0 for a constant one.
        smoothing: The share of the label that is spread over all classes.

    Raises:
        UsageError: A setting out of range.
    """

    threat: Lp | Change
    k: int = 10
    ramp: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_adversary("worst-of-k", _Draws(self.k), self.threat, self.ramp, self.smoothing)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """x', with shape (B, *)."""
        return perturb(_Draws(self.k), model, x, y, ramped(self.threat, self.ramp, at), rng=rng)
