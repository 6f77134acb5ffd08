"""Square: random search with scores only.

Symbols: x_hat is the best candidate so far, delta = x_hat - x, L its margin, n the number of queries, h the side of the square
that is tried, eta a pattern of unit norm on such a square, rho a sign for each channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.norms import lp_norm, per_row
from advkit.oracle import Access, Oracle
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The iterations, of 10,000, at which the share of the input that a square covers is halved."""
DECAY = {2.0: 2, 1.0: 4}
"""How fast eta falls from its centre: the powers of the l_2 and of the l_1 version."""
TILES = 5
"""Into how many tiles the start divides a side of the input in l_2 and l_1."""
FILLS = 3
"""How often a change that the range has cut is stretched to the radius again in l_2."""
STRETCH = 3.0
"""By how much a change is stretched in l_1 before it is projected."""


@dataclass(frozen=True)
class Square:
    r"""Set a random square of the input to x - eps or x + eps, each channel by a coin, and keep it if the margin grows.

    In l_2 and l_1 a step empties a second square as well, and the first gets what both held and what the radius leaves, spread
    as eta: two hills of opposite sign. The papers only clip, or project, the result; here it is stretched first, so that what
    the range cuts off is spent elsewhere.

    The start is x + eps * (-1 or 1) in vertical stripes, in l_2 and l_1 tiles of eta. An input of shape (N, C, H, W) is tried
    in squares, (N, C, T) and (N, D) in intervals. For a target, too, what grows is the margin (the paper uses the cross entropy
    there), and the first share is that of AutoAttack (the paper's is 0.05).

    Andriushchenko, Croce, Flammarion and Hein, 2020, "Square attack: a query-efficient black-box adversarial attack via random
    search", https://arxiv.org/abs/1912.00049; in l_1 Croce and Hein, 2021, "Mind the box: l_1-APGD for sparse adversarial
    attacks on image classifiers", https://arxiv.org/abs/2103.01208.

    Arguments:
        queries: n, how many forward passes are made.
        share: The first share of the input that a square covers.
    """

    queries: int = 5000
    share: float = 0.8
    access = Access.SCORES
    norms = (math.inf, 2.0, 1.0)
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
        image = x.reshape(len(x), *_as_image(x))
        search = self._corners if threat.p == math.inf else self._windows
        return search(oracle, image, x, threat, rng).view_as(x)

    def _corners(self, oracle: Oracle, image: Tensor, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The search in l_inf, among the corners of the ball."""
        channels, height, width = image.shape[1:]
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
        return x_hat

    def _square(self, i: int, height: int, width: int, rows: Tensor, rng: Streams) -> Tensor:
        """Where the i-th query changes the input: a mask with shape (len(rows), 1, H, W)."""
        side = self._side(i, height, width)
        h, w = max(1, min(side, height)), max(1, min(side, width))
        top = rng.integers(height - h + 1, 1, 1, 1, rows=rows)
        left = rng.integers(width - w + 1, 1, 1, 1, rows=rows)
        r = torch.arange(height, device=top.device).view(1, 1, -1, 1)
        c = torch.arange(width, device=top.device).view(1, 1, 1, -1)
        return (r >= top) & (r < top + h) & (c >= left) & (c < left + w)

    def _side(self, i: int, height: int, width: int) -> int:
        """The side h of the square of the i-th query."""
        progress = 10000 * i // self.queries
        share = self.share / 2 ** sum(progress > halving for halving in HALVINGS)
        return round(share * width) if height == 1 else round(math.sqrt(share * height * width))

    def _windows(self, oracle: Oracle, image: Tensor, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The search in l_2 and l_1, which moves the change from one square to another."""
        x_hat = _filled(_tiled(image, threat.p, rng), image, threat)
        L = oracle.loss(x_hat.view_as(x), margin)
        for i in range(1, self.queries):
            rows = oracle.live
            delta = self._moved(i, x_hat[rows] - image[rows], threat, rows, rng)
            tried = _filled(delta, image[rows], threat)
            L_tried = oracle.loss(tried.view(-1, *x.shape[1:]), margin, rows)
            better = L_tried > L[rows]
            x_hat[rows[better]], L[rows[better]] = tried[better], L_tried[better]
        return x_hat

    def _moved(self, i: int, delta: Tensor, threat: Lp, rows: Tensor, rng: Streams) -> Tensor:
        """``delta`` with what two squares hold, and what the radius leaves, in the first of them."""
        p, (channels, height, width) = threat.p, delta.shape[1:]
        side = max(3, self._side(i, height, width)) | 1
        h, w = (1, min(side, width)) if height == 1 else (min(side, height, width),) * 2
        here, there = (_places(h, w, delta, rows, rng) for _ in range(2))
        rho = torch.where(rng.uniform(channels, 1, rows=rows) < 0.5, -1.0, 1.0).to(delta.dtype)
        eta = _either(_pattern(h, w, p, delta), rng.uniform(1, 1, rows=rows) < 0.5)
        flat = delta.flatten(2)
        left = (threat.eps**p - _mass(flat.flatten(1), p)).clamp(min=0.0).unsqueeze(1) / channels
        old = flat.gather(2, here)
        flat = flat.scatter(2, here, 0.0)
        allowed = (left + _mass(old, p) + _mass(flat.gather(2, there), p)) ** (1 / p)
        new = rho * eta + _unit(old, p)
        return flat.scatter(2, there, 0.0).scatter_(2, here, _unit(new, p) * allowed.unsqueeze(2)).view_as(delta)


def _as_image(x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of one row."""
    if x.ndim == 2:
        return 1, 1, x.shape[1]
    height = 1 if x.ndim == 3 else x.shape[-2]
    return x[0].numel() // (height * x.shape[-1]), height, x.shape[-1]


def _mass(d: Tensor, p: float) -> Tensor:
    """The sum of |d|^p over the last axis."""
    return d.abs().sum(-1) if p == 1 else d.square().sum(-1)


def _unit(d: Tensor, p: float) -> Tensor:
    """``d`` with l_p norm 1 over the last axis; zeros stay zeros."""
    return d / (_mass(d, p) ** (1 / p)).clamp(min=torch.finfo(d.dtype).tiny).unsqueeze(-1)


def _places(h: int, w: int, delta: Tensor, rows: Tensor, rng: Streams) -> Tensor:
    """The numbers of the pixels of a random h by w window in each row, with shape (M, C, h * w)."""
    _, channels, height, width = delta.shape
    top = rng.integers(height - h + 1, 1, 1, rows=rows)
    left = rng.integers(width - w + 1, 1, 1, rows=rows)
    r = torch.arange(h, device=top.device).view(-1, 1)
    inside = (r * width + torch.arange(w, device=top.device)).view(1, 1, -1)
    return (inside + top * width + left).expand(-1, channels, -1)


def _pattern(h: int, w: int, p: float, like: Tensor) -> Tensor:
    """eta: two hills of opposite sign side by side, with shape (h, w)."""
    half = w // 2 if h == 1 else h // 2
    if h == 1:
        eta = torch.cat([_hill(1, half, p), -_hill(1, w - half, p)], 1)
    else:
        eta = torch.cat([_hill(half, w, p), -_hill(h - half, w, p)], 0)
    return _unit(eta.flatten(), p).view(h, w).to(like)


def _hill(h: int, w: int, p: float) -> Tensor:
    """Of unit norm; on the d-th ring around the centre the sum of 1 / k^DECAY over k > d, with shape (h, w)."""
    r, c = (torch.arange(n, dtype=torch.float64).sub(n // 2).abs() for n in (h, w))
    ring = torch.maximum(r.unsqueeze(1), c)
    k = torch.arange(1, max(h, w) // 2 + 2)
    hill = ((k > ring.unsqueeze(2)) / k.double() ** DECAY[p]).sum(2)
    return _unit(hill.flatten(), p).view(h, w)


def _either(eta: Tensor, turned: Tensor) -> Tensor:
    """eta, or where ``turned`` (M, 1, 1) says so eta turned by a right angle, with shape (M, 1, h * w)."""
    return eta.view(1, 1, -1) if len(eta) == 1 else torch.where(turned, eta.T.reshape(1, 1, -1), eta.view(1, 1, -1))


def _tiled(image: Tensor, p: float, rng: Streams) -> Tensor:
    """The start: eta on tiles, each with a random sign and turn, with shape (N, C, H, W)."""
    channels, height, width = image.shape[1:]
    w = max(1, (width if height == 1 else min(height, width)) // TILES)
    h = 1 if height == 1 else w
    (r, inside_r), (c, inside_c) = _centred(height, h, image.device), _centred(width, w, image.device)
    eta = _pattern(h, w, p, image)
    here = eta[(r % h).unsqueeze(1), c % w]
    turned = here if height == 1 else eta[c % w, (r % h).unsqueeze(1)]
    tile = (r // h).unsqueeze(1), c // w
    turn = rng.uniform(1, height // h, width // w)[:, :, tile[0], tile[1]] < 0.5
    minus = rng.uniform(channels, height // h, width // w)[:, :, tile[0], tile[1]] < 0.5
    sign = torch.where(minus, -1.0, 1.0).to(image.dtype) * (inside_r.unsqueeze(1) & inside_c)
    return torch.where(turn, turned, here) * sign


def _centred(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The place of each entry of a side along its tiles, which are centred, and whether it is on one."""
    used = length // size * size
    place = torch.arange(length, device=device) - (length - used) // 2
    return place.clamp(0, used - 1), (place >= 0) & (place < used)


def _filled(delta: Tensor, image: Tensor, threat: Lp) -> Tensor:
    """The input changed by delta, inside the range and on the sphere as far as the range lets it, with shape (M, C, H, W)."""
    if threat.p == 2:
        for _ in range(FILLS):
            longer = threat.eps / lp_norm(delta, 2).clamp(min=torch.finfo(delta.dtype).tiny)
            delta = (image + delta * per_row(longer, delta)).clamp_(threat.low, threat.high) - image
        return threat.project(image + delta, image)
    return threat.project(image + STRETCH * delta, image)
