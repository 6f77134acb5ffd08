"""Square: random search with scores only.

Symbols: x_hat is the best candidate so far, L its margin, n the number of queries, h the side of the square that is tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The iterations, of 10,000, at which the share of the input that a square covers is halved."""


@dataclass(frozen=True)
class Square:
    r"""Set a random square of the input to x - eps or x + eps, each channel by a coin, and keep it if the margin grows.

    The start is x + eps * (-1 or 1) in vertical stripes. An input of shape (N, C, H, W) is tried in squares, (N, C, T) and
    (N, D) in intervals. For a target, too, what grows is the margin (the paper uses the cross entropy there), and the first
    share is that of AutoAttack (the paper's is 0.05).

    Andriushchenko, Croce, Flammarion and Hein, 2020, "Square attack: a query-efficient black-box adversarial attack via random
    search", https://arxiv.org/abs/1912.00049.

    Arguments:
        queries: n, how many forward passes are made.
        share: The first share of the input that a square covers.
    """

    queries: int = 5000
    share: float = 0.8
    access = Access.SCORES
    norms = (math.inf,)
    minimum = False
    paper = "Andriushchenko et al. 2020"

    def __post_init__(self) -> None:
        check_whole("square: queries", self.queries, 1)
        check_positive("square: share", self.share)

    @property
    def cost(self) -> int:
        """The queries."""
        return self.queries

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The best candidate, with shape (N, *)."""
        # Every input is a stack of channels of images; a row without height is an image of height 1.
        channels, height, width = _as_image(x)
        image = x.reshape(len(x), channels, height, width)
        up, down = (
            threat.project(x + threat.eps, x).view_as(image),
            threat.project(x - threat.eps, x).view_as(image),
        )
        x_hat = torch.where(rng.uniform(channels, 1, width) < 0.5, down, up)
        L = oracle.loss(x_hat.view_as(x), margin)
        for i in range(1, self.queries):
            rows = oracle.live
            square = self._square(i, height, width, rows, rng)
            coin = rng.uniform(channels, 1, 1, rows=rows) < 0.5
            tried = torch.where(square, torch.where(coin, down[rows], up[rows]), x_hat[rows])
            # A square that would change nothing is turned over in every channel, so that no query is wasted on it.
            idle = (tried == x_hat[rows]).flatten(1).all(1).view(-1, 1, 1, 1)
            tried = torch.where(idle & square, torch.where(coin, up[rows], down[rows]), tried)
            L_tried = oracle.loss(tried.view(-1, *x.shape[1:]), margin, rows)
            better = L_tried > L[rows]
            x_hat[rows[better]], L[rows[better]] = tried[better], L_tried[better]
        return x_hat.view_as(x)

    def _square(self, i: int, height: int, width: int, rows: Tensor, rng: Streams) -> Tensor:
        """Where the i-th query changes the input: a mask with shape (len(rows), 1, H, W)."""
        progress = 10000 * i // self.queries
        share = self.share / 2 ** sum(progress > halving for halving in HALVINGS)
        side = round(share * width) if height == 1 else round(math.sqrt(share * height * width))
        h, w = max(1, min(side, height)), max(1, min(side, width))
        top = rng.integers(height - h + 1, 1, 1, 1, rows=rows)
        left = rng.integers(width - w + 1, 1, 1, 1, rows=rows)
        r = torch.arange(height, device=top.device).view(1, 1, -1, 1)
        c = torch.arange(width, device=top.device).view(1, 1, 1, -1)
        return (r >= top) & (r < top + h) & (c >= left) & (c < left + w)


def _as_image(x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of one row."""
    if x.ndim == 2:
        return 1, 1, x.shape[1]
    height = 1 if x.ndim == 3 else x.shape[-2]
    return x[0].numel() // (height * x.shape[-1]), height, x.shape[-1]
