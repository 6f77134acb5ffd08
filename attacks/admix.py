"""Admix: gradients averaged over copies of the input that a little of other images was mixed into.

Symbols: x' is an image that is mixed in, eta its share, n the number of such images, gamma_i = 1 / 2^i the i-th of m scales.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit import data as data_by_name
from advkit.combine import Lens, Wrapper
from advkit.engine import Attack
from advkit.errors import UsageError
from advkit.losses import Loss
from advkit.oracle import Oracle, Through
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.surrogates import check_gradients
from advkit.threat import Lp

BANK = 500
"""How many images of a data set are there to be mixed in."""


class _Mixed(Lens):
    """The oracle, with the mean over mixed and scaled copies in place of the loss and its gradient."""

    def __init__(self, oracle: Oracle, attack: Admix, draw: Callable[[], Tensor]) -> None:
        super().__init__(oracle)
        self.attack, self.draw = attack, draw

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of the copies, and its gradient in the candidates."""
        values, g = torch.zeros(len(x_adv), dtype=x_adv.dtype, device=x_adv.device), torch.zeros_like(x_adv)
        for _ in range(self.attack.n):
            # For every row, so that all streams stay in step.
            other = self.attack.eta * self.draw()
            for i in range(self.attack.m):

                def mixed(z: Tensor, who: Tensor, other: Tensor = other, i: int = i) -> Tensor:
                    z = z if through is None else through(z, who)
                    if other.shape[1:] != z.shape[1:]:
                        theirs, ours = tuple(other.shape[1:]), tuple(z.shape[1:])
                        raise UsageError(
                            f"admix mixes examples of shape {theirs} into inputs of shape {ours}; name data like the inputs"
                        )
                    return (z + other[who]) / 2**i

                values_i, g_i = self.oracle.grad(x_adv, loss, rows, towards=towards, through=mixed)
                values, g = values + values_i, g + g_i
        copies = self.attack.n * self.attack.m
        return values / copies, g / copies


def _texture(x: Tensor, rng: Streams) -> Tensor:
    """For each row, noise with a spectrum of 1 / frequency, as pictures have, over the row's own range; (N, *)."""
    axes = (-2, -1) if x.ndim > 3 else (-1,)
    waves = torch.fft.fftn(rng.normal(*x.shape[1:], dtype=x.dtype), dim=axes)
    frequency = torch.zeros((), dtype=x.dtype, device=x.device)
    for axis in axes:
        n = x.shape[axis]
        f = torch.fft.fftfreq(n, 1 / n, dtype=x.dtype, device=x.device)
        frequency = frequency + (f**2).view(-1, *(1,) * (-1 - axis))
    noise = torch.fft.ifftn(waves / frequency.clamp(min=1.0).sqrt(), dim=axes).real.flatten(1)
    least, most = noise.amin(1, keepdim=True), noise.amax(1, keepdim=True)
    share = (noise - least) / (most - least).clamp(min=torch.finfo(x.dtype).tiny)
    low, high = x.flatten(1).amin(1, keepdim=True), x.flatten(1).amax(1, keepdim=True)
    return (low + share * (high - low)).view_as(x)


@functools.lru_cache(maxsize=2)
def _bank(source: str, low: float | None, high: float | None) -> Tensor:
    """Up to ``BANK`` images of a data set's split ``train``, with the classes in proportion, with shape (M, *)."""
    data = data_by_name.load(source, split="train", limit=BANK, low=low, high=high)
    return data.batch(0, len(data))[0]


@dataclass(frozen=True)
class Admix(Wrapper):
    r"""The attack with the mean gradient of L(gamma_i * (x + eta * x')), over n images x' and m scales, in place of L(x)'s.

    Wang, He, Wang and He, 2021, "Admix: enhancing the transferability of adversarial attacks", https://arxiv.org/abs/2102.00436.
    The paper mixes in images of the same batch and of other classes. Here a row's result depends on no other row, and an attack
    sees no labels: x' is one of up to 500 training examples of ``data``, of any class. Without ``data`` it is no image, but
    noise with the spectrum of one.

    Arguments:
        attack: An attack with gradients.
        data: Where x' comes from, as ``--data`` names it; its examples have the inputs' shape.
        n: How many images are mixed in, one at a time.
        m: How many scales. The paper's is 5; on small images the darker copies cost passes and made worse examples.
        eta: The share of x'.

    Raises:
        UsageError: The data cannot be read; when called, its images are not of the inputs' shape.
    """

    attack: Attack
    data: str | None = None
    n: int = 3
    m: int = 1
    eta: float = 0.2
    paper = "Wang et al. 2021"

    def __post_init__(self) -> None:
        check_gradients("admix", self.attack)
        check_whole("admix: n", self.n, 1)
        check_whole("admix: m", self.m, 1)
        check_positive("admix: eta", self.eta)

    @property
    def cost(self) -> int:
        """At most n * m times the attack's."""
        return self.n * self.m * self.attack.cost

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The attack's last iterate, with shape (N, *)."""
        return self.attack(_Mixed(oracle, self, self._drawing(x, threat, rng)), x, threat, rng)

    def _drawing(self, x: Tensor, threat: Lp, rng: Streams) -> Callable[[], Tensor]:
        """What draws an x' for each row, with shape (N, *)."""
        if self.data is None:
            return lambda: _texture(x, rng)
        finite = math.isfinite(threat.low) and math.isfinite(threat.high)
        bank = _bank(self.data, threat.low if finite else None, threat.high if finite else None).to(x)
        return lambda: bank[rng.integers(len(bank))]
