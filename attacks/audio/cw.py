"""The attack of Carlini and Wagner on speech: a sound that says a text, as quiet as can be.

Symbols: theta is what is added to a sound, relative to its size; ell the recogniser's loss for a text, tau the bound of theta,
m and s the moments of Adam, D how many entries of theta the recogniser hears.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.engine import AttackResult
from advkit.losses import ce
from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

BETA_1, BETA_2 = 0.9, 0.99
"""How fast Adam's moments forget."""
SHRINK = 0.8
"""What becomes of tau after a success."""
GROW, LAST = 1.01, 0.99
"""What becomes of it after any other step, once there was a success; and the most that it is, as a share of that one's norm."""
PACE = 0.3
"""The most that a step may be, as a share of tau."""
CREST = 10.0
"""The peak of speech, as a multiple of its root mean square."""
LOOSER = 1.2
"""How much louder than what was found on a stand-in a sound may be on the recogniser itself."""


@dataclass(frozen=True)
class SpeechCW:
    r"""Adam on ||theta||_2^2 + c * ell in ||theta||_p <= tau; with each success tau becomes 0.8 of that success's norm.

    Carlini and Wagner, 2018, "Audio adversarial examples: targeted attacks on speech-to-text",
    https://arxiv.org/abs/1801.01944. There tau is the greatest sample added, which is what ``linf_db`` asks for; with ``snr``
    it is the root of the sum of squares. theta is measured so that no setting depends on how loud or long a sound is: in
    l_inf, the first term is a hundred times the mean of the squares, as the peak of speech is about ten times its root mean
    square. Adam's step falls to 0, and is never more than a part of tau: near the quietest success, a step of the first size
    would be louder than what was found. In l_2 Adam becomes the plain gradient on the way: dividing each entry by a size of its
    own is quick at first, but where it comes to rest on the sphere is not where the loss is least.

    Arguments:
        steps: How many gradients are taken.
        lr: The first step, as a share of the sound's root mean square (with ``linf_db``, of a tenth of its peak).
        c: The weight of the loss.
        repair: How many gradients of the recogniser itself follow those of a cheaper stand-in; see
            :func:`advkit.attacks.audio.phases.quietest`.
    """

    steps: int = 200
    lr: float = 0.03
    c: float = 0.05
    repair: int = 10
    access = Access.GRADIENTS
    norms = (math.inf, 2.0)
    minimum = True
    paper = "Carlini and Wagner 2018"

    def __post_init__(self) -> None:
        check_whole("cw: steps", self.steps, 1)
        check_whole("cw: repair", self.repair, 1)
        check_positive("cw: lr", self.lr)
        check_positive("cw: c", self.c)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, T)."""
        return self.descend(oracle, x, threat, x.new_full((len(x),), threat.eps), self.steps)

    def after(self, found: AttackResult) -> Repair:
        """The attack that goes on from what this one found on a stand-in."""
        return Repair(self, found)

    def descend(self, oracle: Oracle, theta: Tensor, threat: Lp, tau: Tensor, steps: int) -> Tensor:
        """The last iterate, with shape (N, T), from theta (N, T) and the first bounds tau (N,)."""
        m, s = torch.zeros_like(theta), torch.zeros_like(theta)
        known = oracle.distance.clone()
        for i in range(steps):
            _, g = oracle.grad(theta, ce)
            better = oracle.distance < known
            known = oracle.distance.clone()
            grown = torch.where(known < math.inf, torch.minimum(GROW * tau, LAST * known), tau)
            tau = torch.where(better, SHRINK * known, grown)
            D = (g != 0).sum(1).clamp(min=1)
            # What an entry is where theta is as loud as the sound.
            unit = 1 / D.sqrt() if threat.p == 2 else torch.full_like(tau, 1 / CREST)
            d = self.c * g - 2 * theta * per_row(1 / (D * unit**2), theta)
            m, s = m.lerp(d, 1 - BETA_1), s.lerp(d * d, 1 - BETA_2)
            step = torch.minimum(PACE * (tau * unit if threat.p == 2 else tau), self.lr * unit)
            step = step * math.sqrt(1 - i / steps) * math.sqrt(1 - BETA_2 ** (i + 1)) / (1 - BETA_1 ** (i + 1))
            theta = _inside(theta + per_row(step, m) * m / _scale(s, D, i / steps if threat.p == 2 else 0), threat.p, tau)
        return theta


@dataclass(frozen=True, eq=False)
class Repair:
    """The last steps of an attack, on a recogniser that hears a little differently from the one that the steps before were for.

    Arguments:
        attack: The attack.
        found: What it found; its bound is loosened a little.
    """

    attack: SpeechCW
    found: AttackResult
    access = Access.GRADIENTS
    norms = SpeechCW.norms
    minimum = True
    paper = SpeechCW.paper

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.attack.repair

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, T)."""
        theta = x if self.found.change is None else self.found.change
        size = LOOSER * lp_norm(theta, threat.p)
        tau = torch.where(self.found.success & (size > 0), size, math.inf).clamp(max=threat.eps)
        return self.attack.descend(oracle, theta, threat, tau, self.attack.repair)


def _scale(s: Tensor, D: Tensor, share: float) -> Tensor:
    """What Adam divides by, sqrt(s), and for a share of it the same number for all entries of a row."""
    same = (s.sum(1) / D).sqrt()
    return ((1 - share) * s.sqrt() + per_row(share * same, s)).clamp(min=torch.finfo(s.dtype).tiny)


def _inside(theta: Tensor, p: float, tau: Tensor) -> Tensor:
    """Theta in the balls of radius tau, one for each row."""
    if p == math.inf:
        bound = tau.view(-1, 1)
        return theta.clamp(-bound, bound)
    return theta * per_row((tau / lp_norm(theta, 2).clamp(min=torch.finfo(theta.dtype).tiny)).clamp(max=1), theta)
