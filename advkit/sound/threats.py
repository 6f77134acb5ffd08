"""How far a sound may be changed, in decibels relative to the sound itself.

Symbols: x is a waveform (N, T) in [-1, 1], delta what is added, theta = delta divided by the size of x. The adversary searches
theta, in a ball; nothing is added to the digital silence at the end of a shorter sound. What theta has there counts in its norm
nevertheless: a random start in l_2 spends a part of the ball on it, of which ten steps of PGD leave about 0.1 dB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from advkit.ball import Lp
from advkit.errors import UsageError
from advkit.norms import lp_norm, per_row
from advkit.sound.wav import STEPS, quantised


def lengths(x: Tensor) -> Tensor:
    """How many samples each waveform has before its trailing zeros, with shape (N,) and dtype int64; x is (N, T).

    >>> lengths(torch.tensor([[0.1, 0.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([3, 0])
    """
    last = torch.arange(1, x.shape[1] + 1, device=x.device)
    return torch.where(x != 0, last, 0).amax(1)


def sounding(x: Tensor) -> Tensor:
    """Which samples are before the trailing zeros, with shape (N, T) and dtype bool."""
    return torch.arange(x.shape[1], device=x.device) < lengths(x).unsqueeze(1)


def check_sounds(x: Tensor) -> None:
    """Refuse what is no batch of waveforms, or holds nothing but zeros.

    Raises:
        UsageError: The shape is not (N, T), or a waveform is digital silence.
    """
    if x.ndim != 2:
        raise UsageError(f"the inputs have shape {tuple(x.shape)}; this threat model changes waveforms, (N, T)")
    silent = int((x == 0).all(1).sum())
    if silent:
        raise UsageError(f"{silent} of {len(x)} waveforms are digital silence; a change in decibels is relative to a sound")


class Decibels:
    """What the threats in decibels have in common; a dataclass with fields db, low and high."""

    db: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if math.isnan(self.db):
            raise UsageError("db is nan; it should be a number of decibels")
        if not -math.inf < self.low < self.high < math.inf:
            raise UsageError(f"the range is [{self.low}, {self.high}]; it should be two finite numbers, low less than high")

    @property
    def eps(self) -> float:
        """10^(db / 20), the greatest norm of theta."""
        return math.inf if self.db == math.inf else 10 ** (self.db / 20)

    def with_eps(self, eps: float) -> Self:
        """The same threat model where the greatest norm of theta is another."""
        return replace(self, db=20 * math.log10(eps))  # type: ignore[type-var]

    @property
    def ball(self) -> Lp:
        """The ball of theta, in l_inf."""
        return Lp(math.inf, self.eps, -math.inf, math.inf)

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which rows are finite and in the range, with shape (N,); theta's ball says the rest."""
        return Lp(math.inf, math.inf, self.low, self.high).allows(x_adv, x)

    def snap(self, x_adv: Tensor, x: Tensor, levels: int, outward: bool = False) -> Tensor:
        """``x_adv`` as a file of 16 bits holds it, with shape (N, T): the nearest values."""
        return quantised(x_adv)

    def added(self, x: Tensor, delta: Tensor) -> Tensor:
        """The sum x + delta in the range, with shape (N, T); trailing zeros stay."""
        return torch.where(sounding(x), (x + delta).clamp(self.low, self.high), x)


class _Added(Decibels):
    """Theta is the waveform that is added, relative to the size of the sound."""

    p: float

    @property
    def ball(self) -> Lp:
        """The ball of theta."""
        return Lp(self.p, self.eps, -math.inf, math.inf)

    def size(self, x: Tensor) -> Tensor:
        """What theta is relative to, with shape (N,)."""
        return lp_norm(x, self.p)

    def zero(self, x: Tensor) -> Tensor:
        """Zeros, with shape (N, T)."""
        check_sounds(x)
        return torch.zeros_like(x)

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """The sum x + theta * size(x), in the range, with shape (N, T)."""
        return self.added(x, theta * per_row(self.size(x), x))

    def snap(self, x_adv: Tensor, x: Tensor, levels: int, outward: bool = False) -> Tensor:
        """``x_adv`` as a file of 16 bits holds it, with shape (N, T); rows that are then too loud are rounded towards x."""
        nearest = quantised(x_adv)
        loud = lp_norm(nearest - x, self.p) > (1 + 1e-6) * self.eps * self.size(x)
        return torch.where(loud.unsqueeze(1), x + ((x_adv - x) * STEPS).trunc() / STEPS, nearest)


@dataclass(frozen=True)
class Snr(_Added):
    r"""All x + delta with 20 log10(||x||_2 / ||delta||_2) >= db: a signal-to-noise ratio of at least so much.

    Arguments:
        db: The least signal-to-noise ratio, in decibels; -inf asks for the quietest success.
        low: The least value the data may have.
        high: The greatest.

    Raises:
        UsageError: The decibels are no number, or the range is empty or infinite.

    >>> Snr(20).apply(torch.tensor([[0.3, 0.4]]), torch.tensor([[0.1, 0.0]]))
    tensor([[0.3500, 0.4000]])
    """

    db: float = -math.inf
    low: float = -1.0
    high: float = 1.0
    p = 2.0

    @property
    def eps(self) -> float:
        """10^(-db / 20), the greatest norm of theta."""
        return math.inf if self.db == -math.inf else 10 ** (-self.db / 20)

    def with_eps(self, eps: float) -> Self:
        """The same threat model where the greatest norm of theta is another."""
        return replace(self, db=-20 * math.log10(eps))


@dataclass(frozen=True)
class Level(_Added):
    r"""All x + delta with 20 log10(max |delta| / max |x|) <= db: the loudest sample added against the loudest there is.

    Carlini and Wagner, 2018, "Audio adversarial examples: targeted attacks on speech-to-text",
    https://arxiv.org/abs/1801.01944, call this dB_x(delta).

    Arguments:
        db: The most decibels, -40 for a hundredth; inf asks for the quietest success.
        low: The least value the data may have.
        high: The greatest.

    Raises:
        UsageError: The decibels are no number, or the range is empty or infinite.
    """

    db: float = math.inf
    low: float = -1.0
    high: float = 1.0
    p = math.inf
