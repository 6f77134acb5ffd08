"""SimBA: one direction of a basis at a time, up or down.

Symbols: x_t is the iterate, L its margin, q a direction of the basis, alpha the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_choice, check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

BAND = 0.15
"""The share of the frequencies of each axis that is tried before the next ones, in the basis dct."""
STEP = {math.inf: 1.0, 2.0: 0.1}
"""The step, as a share of eps."""


@dataclass(frozen=True)
class SimBA:
    r"""x_t + alpha * q, or else x_t - alpha * q, projected into the ball, is kept if the margin grows.

    q is an entry of the input (``pixel``) or a cosine wave on one of its channels (``dct``), of unit length in the norm of the
    threat model. Each row tries the directions in a random order of its own, and none twice before it has tried all; of the
    waves the lowest frequencies come first, then the next band. The paper's change may grow with every step; here
    it stays inside the radius, and l_inf is served too.

    Guo, Gardner, You, Wilson and Weinberger, 2019, "Simple black-box adversarial attacks", https://arxiv.org/abs/1905.07121.

    Arguments:
        queries: How many forward passes are made.
        basis: ``pixel`` or ``dct``.
        step: alpha, in the units of the data; by default eps in l_inf and 0.1 * eps in l_2.
    """

    queries: int = 5000
    basis: str = "dct"
    step: float | None = None
    access = Access.SCORES
    norms = (math.inf, 2.0)
    minimum = False
    paper = "Guo et al. 2019"

    def __post_init__(self) -> None:
        check_whole("simba: queries", self.queries, 1)
        check_choice("simba: basis", self.basis, BASES)
        check_positive("simba: step", self.step)

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The best candidate, with shape (N, *)."""
        alpha = STEP[threat.p] * threat.eps if self.step is None else self.step
        image = x.reshape(len(x), *_as_image(x))
        order, direction = _order(image, self.basis, rng), BASES[self.basis]
        # Where each row is in its order, and whether it is turned to the other side.
        turn = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        down = torch.zeros_like(turn, dtype=torch.bool)
        x_t, L = x.clone(), oracle.loss(x, margin)
        for _ in range(1, self.queries):
            rows = oracle.live
            q = direction(order[rows, turn[rows] % order.shape[1]], image, threat.p).view(-1, *x.shape[1:])
            step = torch.where(down[rows], -alpha, alpha).to(x.dtype)
            tried = threat.project(x_t[rows] + per_row(step, x) * q, x[rows])
            L_tried = oracle.loss(tried, margin, rows)
            better = L_tried > L[rows]
            x_t[rows[better]], L[rows[better]] = tried[better], L_tried[better]
            settled = better | down[rows]
            turn[rows] += settled
            down[rows] = ~settled
        return x_t


def _as_image(x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of one row; one without height is an image of height 1."""
    if x.ndim == 2:
        return 1, 1, x.shape[1]
    height = 1 if x.ndim == 3 else x.shape[-2]
    return x[0].numel() // (height * x.shape[-1]), height, x.shape[-1]


def _order(image: Tensor, basis: str, rng: Streams) -> Tensor:
    """The numbers of the directions in a random order for each row, with shape (N, C * H * W)."""
    channels, height, width = image.shape[1:]
    key = rng.uniform(channels, height, width, dtype=torch.float64)
    if basis == "dct":
        f, k = (torch.arange(n, device=image.device) / n for n in (height, width))
        key += (torch.maximum(f.unsqueeze(1), k) / BAND).floor()
    return key.flatten(1).argsort(dim=1, stable=True)


def _entry(chosen: Tensor, image: Tensor, p: float) -> Tensor:
    """1 at the entry chosen for each row, (M,), and 0 elsewhere, with shape (M, C * H * W)."""
    return image.new_zeros(len(chosen), image[0].numel()).scatter_(1, chosen.unsqueeze(1), 1.0)


def _wave(chosen: Tensor, image: Tensor, p: float) -> Tensor:
    """The cosine wave chosen for each row, (M,): of the discrete cosine transform, of l_p norm 1, with shape (M, C, H, W)."""
    channels, height, width = image.shape[1:]
    channel, f, k = chosen // (height * width), chosen // width % height, chosen % width
    wave = _cosine(f, height, image).unsqueeze(2) * _cosine(k, width, image).unsqueeze(1)
    wave = (wave / per_row(lp_norm(wave, p), wave)).unsqueeze(1)
    here = torch.arange(channels, device=image.device) == channel.unsqueeze(1)
    return wave * here.view(-1, channels, 1, 1)


def _cosine(frequency: Tensor, n: int, image: Tensor) -> Tensor:
    """cos(pi * frequency * (i + 1/2) / n) for i < n, with shape (M, n)."""
    place = torch.arange(n, dtype=image.dtype, device=image.device) + 0.5
    return torch.cos(frequency.unsqueeze(1) * place * (math.pi / n))


BASES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"pixel": _entry, "dct": _wave}
"""The directions by the names of their bases."""
