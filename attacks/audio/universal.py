"""Universal perturbations of speech: one sound that, added to any clip, makes a recogniser mishear it.

Symbols: delta is the perturbation of L samples, x a clip of T samples, d(x) what is added to it: delta over and over, cut to T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.audio.recogniser import Recogniser, goal
from advkit.engine import check_inputs
from advkit.errors import UsageError
from advkit.oracle import Access
from advkit.sound.threats import Level, Snr, sounding
from advkit.sound.wav import LONGEST
from advkit.spec import check_positive, check_whole
from advkit.stochastic import Ascent, Progress

LEAST = 0.01
"""The seconds of the shortest perturbation: an even shorter one, over and over, is a hum."""


@dataclass(frozen=True)
class SpeechUniversal:
    r"""Stochastic ascent on the mean over clips of min(L(x + d(x)), beta), the loss L of what was said, a letter of it.

    The goal is that of Neekhara, Hussain, Pandey, Dubnov, McAuley and Koushanfar, 2019, "Universal adversarial perturbations
    for speech recognition systems", https://arxiv.org/abs/1905.03828: a high error rate on clips never seen. They go through
    the clips one after the other, each until its error rate is high; here the cap beta says when a clip is wrong enough, and
    steps are taken on batches (Shafahi et al., 2020, "Universal adversarial training", https://arxiv.org/abs/1811.11304).
    What is added is scaled with each clip, as the threat model is, and is never louder than that allows.

    Arguments:
        steps: How many batches.
        batch_size: How many clips are in one.
        seconds: L, in seconds.
        alpha: The first step, in multiples of the radius.
        beta: The greatest loss that counts, in nats a letter.
    """

    steps: int = 200
    batch_size: int = 16
    seconds: float = 1.0
    alpha: float = 0.2
    beta: float = 4.0
    access = Access.GRADIENTS
    norms = (math.inf, 2.0)
    minimum = False
    paper = "Neekhara et al. 2019"

    def __post_init__(self) -> None:
        check_whole("universal: steps", self.steps, 1)
        check_whole("universal: batch_size", self.batch_size, 1)
        if not LEAST <= self.seconds <= LONGEST:
            raise UsageError(f"universal: seconds is {self.seconds}; it should be from {LEAST} to {LONGEST:g}")
        check_positive("universal: alpha", self.alpha)
        check_positive("universal: beta", self.beta)

    def fit(
        self,
        recogniser: Recogniser,
        x: Tensor,
        texts: Sequence[str],
        threat: Snr | Level,
        *,
        rng: torch.Generator,
        report: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """The perturbation, in units of the threat model's theta, with shape (L,).

        Arguments:
            recogniser: Who should mishear; used in evaluation mode, and left as it was.
            x: The clips to learn from, with shape (N, T).
            texts: What is said in each.
            threat: How loud it may be.
            rng: Where delta and the order of the clips come from.
            report: Called after each step.

        Raises:
            UsageError: The clips are not of this form or nothing is said in one, or the threat model is another.
            AccessError: The recogniser gives no gradient.
        """
        if not isinstance(threat, Snr | Level) or threat.eps == math.inf:
            allowed = "a universal perturbation needs a fixed loudness, as in linf_db(-30) or snr(30)"
            raise UsageError(f"{allowed}; it was given {threat!r}")
        if len(texts) != len(x) or not all(texts):
            raise UsageError(
                f"there are {len(x)} clips and {sum(map(bool, texts))} texts; something should be said in each clip"
            )
        y = torch.arange(len(x), device=x.device)
        check_inputs(x, y, threat)
        misheard = goal(recogniser, texts)
        letters = torch.tensor([len(text) for text in texts], dtype=x.dtype, device=x.device)
        length = round(self.seconds * recogniser.rate)
        step = self._step(threat, length)
        # At 0 the loss of a clip that is understood has next to no gradient.
        start = step * (2 * torch.rand(length, generator=rng).to(x) - 1)
        ascent = Ascent(self.steps, self.batch_size, step, self.beta, even=threat.p == 2)
        loss = misheard.loss
        assert loss is not None
        return ascent(
            recogniser,
            x,
            y,
            start,
            lambda clips, delta, _: self.apply(clips, delta, threat),
            lambda delta: threat.ball.project(delta.unsqueeze(0), torch.zeros_like(delta).unsqueeze(0)).squeeze(0),
            loss=lambda outputs, who: loss(outputs, who) / letters[who],
            goal=misheard,
            rng=rng,
            report=report,
        )

    def _step(self, threat: Snr | Level, length: int) -> float:
        """The first step of an entry: a share of the radius, in l_2 of what each entry has of it."""
        return self.alpha * threat.eps / (1.0 if threat.p == math.inf else math.sqrt(length))

    def apply(self, x: Tensor, delta: Tensor, threat: Snr | Level) -> Tensor:
        """The clips with delta over and over, inside the threat model, with shape (N, T)."""
        tiled = delta.repeat(-(-x.shape[1] // len(delta)))[: x.shape[1]]
        theta = torch.where(sounding(x), tiled, 0.0)
        return threat.apply(x, threat.ball.project(theta, torch.zeros_like(theta)))
