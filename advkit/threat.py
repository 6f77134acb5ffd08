"""What an adversary may change, and how far.

A threat model knows nothing of models or labels. The range of the data belongs to it: pixels are in [0, 1], waveforms in
[-1, 1], and a perturbation that leaves the range is not allowed, whatever its norm.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Protocol

from torch import Tensor

from advkit.ball import Lp as Lp
from advkit.changes import Colour as Colour
from advkit.changes import Flow as Flow
from advkit.changes import Masked as Masked
from advkit.changes import Rotation as Rotation
from advkit.changes import Sticker as Sticker
from advkit.latent import Latent as Latent
from advkit.sound.masking import Masking as Masking
from advkit.sound.threats import Level as Level
from advkit.sound.threats import Snr as Snr
from advkit.spec import Table
from advkit.streams import Streams


class ThreatModel(Protocol):
    """What every threat model answers; frozen data. Inputs are batch-first, (N, *), floating point."""

    @property
    def eps(self) -> float:
        """The radius; inf means: find the closest example."""

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """How far each row of ``x_adv`` is from ``x``, with shape (N,)."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """An allowed input close to ``x_adv``, with shape (N, *); idempotent."""

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which rows are inside the threat model, with shape (N,) and dtype bool."""

    def start(self, x: Tensor, rng: Streams) -> Tensor:
        """A random allowed input for each row, with shape (N, *)."""


class Change(Protocol):
    """A threat model whose adversary turns, bends or colours an input: (x, theta) to an input, theta in a ball.

    Attacks search theta as they would search an input: with gradients through ``apply``, with scores or with labels. What is
    allowed is decided on theta, exactly, and distances are those of theta. Frozen data.
    """

    @property
    def eps(self) -> float:
        """The radius of the ball."""

    @property
    def low(self) -> float:
        """The least value of the data."""

    @property
    def high(self) -> float:
        """The greatest."""

    @property
    def ball(self) -> Lp:
        """Which parameters are allowed: the ball around ``zero``, and their range."""

    def zero(self, x: Tensor) -> Tensor:
        """The parameters that change nothing, with shape (N, *).

        Raises:
            UsageError: Inputs of this shape cannot be changed so.
        """

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """``x`` changed by ``theta``, in the range, with the shape of x; differentiable in theta where it can be."""

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which rows are finite and in the range, with shape (N,); theta's ball says the rest."""

    def snap(self, x_adv: Tensor, x: Tensor, levels: int, outward: bool = False) -> Tensor:
        """``x_adv`` on the grid of ``levels`` equal steps from low to high, with shape (N, *)."""


BALLS: Table = {
    "linf": partial(Lp, p=math.inf),
    "l2": partial(Lp, p=2.0),
    "l1": partial(Lp, p=1.0),
    "l0": partial(Lp, p=0.0),
}
"""The balls that a spec may name: ``linf(8/255)``, ``l2`` (no radius: the closest example)."""

SOUNDS: Table = {"snr": Snr, "linf_db": Level, "masking": Masking}
"""The changes of a waveform: ``snr(30)``, ``linf_db(-40)``, ``masking(0)``."""

CHANGES: Table = {"rotation": Rotation, "flow": Flow, "colour": Colour, "sticker": Sticker, "latent": Latent, **SOUNDS}
"""The changes that a spec may name: ``rotation(angle=30)``."""

THREATS: Table = {**BALLS, **CHANGES}
"""The threat models that a spec may name."""
