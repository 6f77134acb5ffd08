"""How far a sound may be changed, in decibels relative to the sound itself.

Symbols: x is a waveform (N, T) in [-1, 1], delta what is added, theta = delta divided by the size of x. The adversary searches
theta, in a ball; nothing is added to the digital silence at the end of a shorter sound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.ball import Lp
from advkit.errors import UsageError
from advkit.norms import lp_norm, per_row


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


class _Added:
    """What the threats in decibels have in common; a dataclass with fields db, low and high."""

    p: float
    db: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if math.isnan(self.db):
            raise UsageError("db is nan; it should be a number of decibels")
        if not -math.inf < self.low < self.high < math.inf:
            raise UsageError(f"the range is [{self.low}, {self.high}]; it should be two finite numbers, low less than high")

    def size(self, x: Tensor) -> Tensor:
        """What theta is relative to, with shape (N,)."""
        return lp_norm(x, self.p)

    @property
    def eps(self) -> float:
        """The greatest norm of theta."""
        raise NotImplementedError

    @property
    def ball(self) -> Lp:
        """The ball of theta."""
        return Lp(self.p, self.eps, -math.inf, math.inf)

    def zero(self, x: Tensor) -> Tensor:
        """Zeros, with shape (N, T)."""
        check_sounds(x)
        return torch.zeros_like(x)

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """The sum x + theta * size(x), in the range, with shape (N, T)."""
        delta = theta * per_row(self.size(x), x)
        return torch.where(sounding(x), (x + delta).clamp(self.low, self.high), x)

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which rows are finite and in the range, with shape (N,); theta's ball says the rest."""
        return Lp(math.inf, math.inf, self.low, self.high).allows(x_adv, x)

    def snap(self, x_adv: Tensor, x: Tensor, levels: int, outward: bool = False) -> Tensor:
        """``x_adv`` on the grid of ``levels`` equal steps from low to high, with shape (N, T): the nearest values."""
        return Lp(math.inf, math.inf, self.low, self.high).snap(x_adv, x, levels, outward)


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
        """10^(-db / 20)."""
        return math.inf if self.db == -math.inf else 10 ** (-self.db / 20)


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

    @property
    def eps(self) -> float:
        """10^(db / 20)."""
        return math.inf if self.db == math.inf else 10 ** (self.db / 20)
