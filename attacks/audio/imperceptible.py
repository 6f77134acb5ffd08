"""Sounds that a recogniser hears as something else and a person as they were.

Symbols: x is the carrier, delta what is added, l_net the recogniser's loss, l_theta how far delta is above the masking
threshold of x, alpha its weight; z is a candidate of the oracle, tau the greatest entry that stage one allows it; S(delta) the
short-time Fourier transform of delta, A the greatest size of each of its bins that x hides, u = S(delta) / A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.errors import UsageError
from advkit.losses import ce
from advkit.norms import lp_norm, per_row, project, where
from advkit.oracle import Access, Oracle
from advkit.sound.masking import bounds
from advkit.sound.psychoacoustics import above, sound, spectrum, threshold
from advkit.sound.wav import quantised
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

FIRST, SHRINK = 0.1, 0.8
"""The first tau, where the threat model has no bound; and what becomes of tau after a success."""
MORE, LESS = 1.5, 0.7
"""What becomes of alpha after a success, and after a failure."""
UNDER = 0.7
"""How far under the threshold stage two aims, 3 dB: frames overlap, and what is cut in one comes back from the next."""
BETA_1, BETA_2 = 0.9, 0.999
"""How fast Adam's moments forget."""


@dataclass(frozen=True)
class Imperceptible:
    r"""Stage one finds a success of small amplitude; stage two hides it: min l_net + alpha * l_theta.

    Stage one takes signed gradients inside max |z| <= tau, and each success shrinks tau. Stage two lets the amplitude go, and
    alpha rises with each success and falls with each failure. Of all successes, the one with the least share of its bins above
    the threshold is kept; both are decided on 16 bits. Where a stand-in takes the place of the model, the second half of stage
    two asks the model itself, and only its successes count.

    Qin, Carlini, Goodfellow, Cottrell and Raffel, 2019, "Imperceptible, robust, and targeted adversarial examples for automatic
    speech recognition", https://arxiv.org/abs/1903.10346. There l_theta is the mean excess of power and Adam moves samples, in
    thousands of steps: the loudest bins decide, and the others follow slowly. Here Adam moves u, so that each bin goes as far
    as is hidden there, and l_theta is the sum of max(|u| - 1, 0)^2 / 2, of which a proximal step divides each bin's excess by
    1 + alpha.

    Arguments:
        steps: How many gradients stage one takes.
        hiding: How many stage two takes.
        lr1: The step of stage one, as a share of tau.
        lr2: Adam's step in stage two, as a share of what is hidden.
        alpha: The first alpha.
        every: After how many steps a success is looked for.
        rate: Samples a second.
    """

    steps: int = 60
    hiding: int = 80
    lr1: float = 0.1
    lr2: float = 0.05
    alpha: float = 1.0
    every: int = 5
    rate: int = 16_000
    access = Access.GRADIENTS
    norms = (math.inf,)
    minimum = True
    paper = "Qin et al. 2019"

    def __post_init__(self) -> None:
        for name in ("steps", "hiding", "every", "rate"):
            check_whole(f"imperceptible: {name}", getattr(self, name), 1)
        for name in ("lr1", "lr2", "alpha"):
            check_positive(f"imperceptible: {name}", getattr(self, name))

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step, and a forward pass to look for a success."""
        return 2 * (self.steps + self.hiding) + self.steps // self.every + self.hiding // self.every

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The success of the least share, with shape (N, *); where there is none, the last iterate."""
        rows = oracle.live
        z = x.clone()
        if len(rows):
            case = _Case(oracle, x[rows], threat, rows, self.rate)
            z[rows] = self._hidden(case, *self._found(case))
        return z

    def _found(self, case: _Case) -> tuple[Tensor, Tensor]:
        """Stage one: the smallest success, or the last iterate; and which it is, (N,)."""
        z = best = case.x
        tau = z.new_full((len(z),), min(case.threat.eps, FIRST))
        found = torch.zeros_like(case.rows, dtype=torch.bool)
        for i in case.steps(self.steps):
            z = case.inside(z + self.lr1 * per_row(tau, z) * case.grad(z).sign(), tau)
            if i % self.every == 0:
                met = case.met(z)
                found, best = found | met, where(met, z, best)
                tau = torch.where(met, SHRINK * torch.minimum(tau, lp_norm(z - case.x, math.inf)), tau)
        return where(found, best, z), found

    def _hidden(self, case: _Case, z: Tensor, found: Tensor) -> Tensor:
        """Stage two, from z: the success with the least share above the threshold."""
        best, least = z, torch.where(found, case.share(z), math.inf)
        alpha = z.new_full((len(z),), self.alpha)
        m = s = z.new_zeros(())
        for i in case.steps(self.hiding):
            if i == self.hiding // 2 + 1:
                guessed = case.confirm()
                least, alpha = least.masked_fill(guessed, math.inf), alpha.masked_fill(guessed, self.alpha)
            g = torch.view_as_real(spectrum(case.grad(z)) * case.A)
            m, s = BETA_1 * m + (1 - BETA_1) * g, BETA_2 * s + (1 - BETA_2) * g * g
            step = self.lr2 * math.sqrt(1 - BETA_2**i) / (1 - BETA_1**i)
            u = case.u(z) + torch.view_as_complex(step * m / s.sqrt().clamp(min=torch.finfo(z.dtype).tiny))
            size = u.abs()
            excess = (size - 1).clamp(min=0) * per_row(alpha / (1 + alpha), u)
            z = case.z(u * (1 - excess / size.clamp(min=1)))
            if i % self.every == 0:
                met, share = case.met(z), case.share(z)
                better = met & (share < least)
                best, least = where(better, z, best), torch.where(better, share, least)
                alpha = alpha * torch.where(met, MORE, LESS)
        return where(least < math.inf, best, z)


class _Case:
    """The rows that are attacked: what they hide, and how candidates are heard."""

    def __init__(self, oracle: Oracle, x: Tensor, threat: Lp, rows: Tensor, rate: int) -> None:
        self.oracle, self.x, self.threat, self.rows = oracle, x, threat, rows
        self.carrier = self._sounds(x)
        self.threshold = threshold(self.carrier, rate)
        self.A = UNDER * bounds(self.carrier, rate)[1]
        self.unit = lp_norm(self.carrier, math.inf).unsqueeze(1)

    def _sounds(self, z: Tensor) -> Tensor:
        if self.oracle.render is None or z.ndim != 2:
            raise UsageError("imperceptible adds to a sound; give how much as linf_db(-20), or as linf_db, which has no bound")
        return self.oracle.render(z, self.rows)

    def steps(self, n: int) -> Iterator[int]:
        """From 1 to n, or until the budget has just enough left for a step, a look and the last word."""
        for i in range(1, n + 1):
            if self.oracle.budget is not None and self.oracle.budget - int(self.oracle.forwards.max()) < 3:
                return
            yield i

    def confirm(self) -> Tensor:
        """Which rows only a stand-in was asked about, (N,); from now on the model itself is."""
        guessed = ~self.oracle.exact[self.rows]
        self.oracle.exact[self.rows] = True
        return guessed

    def grad(self, z: Tensor) -> Tensor:
        """The gradient of what is maximised; the oracle takes no note, as a quiet success is not yet a hidden one."""
        return self.oracle.grad(z, ce, self.rows, through=lambda x_adv, rows: x_adv)[1]

    def met(self, z: Tensor) -> Tensor:
        """Which rows are successes in 16 bits, (N,)."""
        return self.oracle.fooled(z, self.rows, through=lambda x_adv, rows: quantised(x_adv))

    def share(self, z: Tensor) -> Tensor:
        """The share of bins above the threshold in 16 bits, (N,)."""
        return above(quantised(self._sounds(z)) - self.carrier, self.threshold)

    def inside(self, z: Tensor, tau: Tensor | float) -> Tensor:
        """The closest candidate of the threat model with entries of at most tau."""
        return self.threat.project(self.x + project(z - self.x, math.inf, tau), self.x)

    def u(self, z: Tensor) -> Tensor:
        """What is added, relative to what is hidden, (N, F, B)."""
        return spectrum((z - self.x) * self.unit) / self.A

    def z(self, u: Tensor) -> Tensor:
        """The candidate whose frames are closest to u A; what is too loud is turned down, as clipping would be heard."""
        d = sound(u * self.A, self.x.shape[1]) / self.unit
        return self.x + d * (self.threat.eps / lp_norm(d, math.inf)).clamp(max=1).unsqueeze(1)
