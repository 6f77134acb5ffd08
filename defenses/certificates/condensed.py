"""A ReLU network around one input, with nothing left of it but the ReLUs that may be on or off.

Symbols: x in R^n is the input, in a box; z in R^U are the values that enter the U ReLUs whose sign the box leaves open, and
h = max(z, 0). All others are linear there, so

    z = G x + T h + c

where T has a block of zeros for each layer and all that follow it. Whatever is asked of the network is a row p x + q h + r.
l <= z <= u are bounds; alpha in [0, 1] is the slope of the line under a ReLU; s in {-1, 0, 1} is the sign of z that is assumed
and beta >= 0 its price.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.defenses.certificates.layers import Affine, Layer, Network, ReLU
from advkit.defenses.certificates.region import Region

_WORK = 2**27
_LR, _DECAY = 0.1, 0.97


class OutOfTime(Exception):
    """Raised where the deadline passes; whoever set it catches it."""


class Overflow(Exception):
    """Raised where a number of the network is not finite, so that nothing can be said of it."""


class Rows(NamedTuple):
    """Linear functions p x + q h + r, with shapes (*, n), (*, U) and (*,)."""

    p: Tensor
    q: Tensor
    r: Tensor

    def at(self, index: Tensor) -> Rows:
        """The rows with these numbers."""
        return Rows(*(part[index] for part in self))


class Box(NamedTuple):
    """What is known of z: l and u, and the signs assumed, each (*, U)."""

    low: Tensor
    high: Tensor
    sign: Tensor

    @property
    def open(self) -> Tensor:
        """Which ReLUs may be on or off, with shape (*, U)."""
        return (self.low < 0) & (self.high > 0)


@dataclass(frozen=True)
class Condensed:
    """The network; see the symbols of the module.

    Attributes:
        g: G, with shape (U, n).
        t: T, with shape (U, U).
        c: With shape (U,).
        starts: The first ReLU of each layer.
        centre: The middle of the box of x, with shape (n,).
        reach: Half its width.
        box: What is known of z.
    """

    g: Tensor
    t: Tensor
    c: Tensor
    starts: tuple[int, ...]
    centre: Tensor
    reach: Tensor
    box: Box

    @property
    def blocks(self) -> list[slice]:
        """The ReLUs of each layer, in order."""
        return [slice(a, b) for a, b in itertools.pairwise((*self.starts, len(self.c)))]

    def to(self, dtype: torch.dtype) -> Condensed:
        """The same in another precision."""
        g, t, c, centre, reach = (part.to(dtype) for part in (self.g, self.t, self.c, self.centre, self.reach))
        return replace(self, g=g, t=t, c=c, centre=centre, reach=reach, box=Box(*(part.to(dtype) for part in self.box)))

    def relus(self, x: Tensor) -> Tensor:
        """What the ReLUs answer to inputs (D, n), with shape (D, U)."""
        h = x.new_zeros(len(x), len(self.c))
        for k in self.blocks:
            h[:, k] = (x @ self.g[k].T + h[:, : k.start] @ self.t[k, : k.start].T + self.c[k]).clamp(min=0)
        return h

    def grown(self, rows: Rows, low: Tensor, high: Tensor) -> Condensed:
        """With one more layer of ReLUs, whose z are ``rows``, with shapes (k, n), (k, U) and (k,), and bounds (k,)."""
        if not len(rows.r):
            return self
        t = F.pad(self.t, (0, len(rows.r), 0, len(rows.r)))
        t[len(self.c) :, : len(self.c)] = rows.q
        ends = zip(self.box, (low, high, torch.zeros_like(low)), strict=True)
        return replace(
            self,
            g=torch.cat([self.g, rows.p]),
            t=t,
            c=torch.cat([self.c, rows.r]),
            starts=(*self.starts, len(self.c)),
            box=Box(*(torch.cat(pair) for pair in ends)),
        )


class Least(NamedTuple):
    """How low a row can be.

    Attributes:
        bound: What it is never below where z is in the box, with shape (*,).
        x: Where the relaxed row is least, with shape (*, n).
        gap: What each ReLU adds to the difference between the relaxed row and the true one at x, with shape (*, U).
        rise: What the bound would gain at most if a ReLU's upper line were exact, with shape (*, U).
        alpha: The slopes, with shape (*, U).
        beta: The prices, with shape (*, U).
    """

    bound: Tensor
    x: Tensor
    gap: Tensor
    rise: Tensor
    alpha: Tensor
    beta: Tensor


class _Lines(NamedTuple):
    """Under a ReLU, slope * z; above it, chord * z + constant."""

    slope: Tensor
    chord: Tensor
    constant: Tensor


def _lines(box: Box, alpha: Tensor) -> _Lines:
    on, off = box.low >= 0, box.high <= 0
    chord = box.high / (box.high - box.low).clamp(min=torch.finfo(box.low.dtype).tiny)
    chord = torch.where(on, 1.0, torch.where(off, 0.0, chord))
    slope = torch.where(on, 1.0, torch.where(off, 0.0, alpha))
    return _Lines(slope, chord, torch.where(on | off, 0.0, -chord * box.low))


def _back(net: Condensed, rows: Rows, lines: _Lines, price: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bound, the coefficients of x and those that each h had when its turn came."""
    _, q, r = rows
    mus, lambdas = [], []
    for k in reversed(net.blocks):
        lam = q[..., k]
        under = lam.clamp(max=0)
        mu = lam.clamp(min=0) * lines.slope[..., k] + under * lines.chord[..., k] - price[..., k]
        r = r + (under * lines.constant[..., k]).sum(-1) + mu @ net.c[k]
        q = q[..., : k.start] + mu @ net.t[k, : k.start]
        mus.append(mu)
        lambdas.append(lam)
    mu, lam = (torch.cat([q, *parts[::-1]], -1) for parts in (mus, lambdas))
    p = rows.p + mu @ net.g
    return p @ net.centre - p.abs() @ net.reach + r, p, lam


def _forth(net: Condensed, p: Tensor, lam: Tensor, lines: _Lines) -> tuple[Tensor, Tensor, Tensor]:
    """The x where p x is least, and the z and h that the chosen lines make of it; z is the gradient in what scales it."""
    x = net.centre - net.reach * p.sign()
    z = x @ net.g.T + net.c
    h = torch.zeros_like(z)
    for k in net.blocks:
        z[..., k] += h[..., : k.start] @ net.t[k, : k.start].T
        over = lam[..., k] >= 0
        v = z[..., k]
        h[..., k] = torch.where(over, lines.slope[..., k] * v, lines.chord[..., k] * v + lines.constant[..., k])
    return x, z, h


def least(net: Condensed, rows: Rows, box: Box, alpha: Tensor, beta: Tensor) -> Least:
    """The bound that these alpha and beta give; alpha and beta (*, U), box and rows in shapes that broadcast."""
    lines = _lines(box, alpha)
    bound, p, lam = _back(net, rows, lines, beta * box.sign)
    x, z, h = _forth(net, p, lam, lines)
    gap = torch.where(box.open, lam.abs() * (h - z.clamp(min=0)).abs(), 0.0)
    return Least(bound, x, gap, -lam.clamp(max=0) * lines.constant, alpha, beta)


def bounds(net: Condensed, rows: Rows, box: Box, alpha: Tensor, beta: Tensor) -> Tensor:
    """The bound of :func:`least` alone."""
    return _back(net, rows, _lines(box, alpha), beta * box.sign)[0]


def ascend(
    net: Condensed, rows: Rows, box: Box, alpha: Tensor, beta: Tensor, steps: int, deadline: float, enough: float = math.inf
) -> tuple[Tensor, Tensor]:
    """The best alpha and beta of the first and those after each of ``steps`` steps of Adam, each (*, U).

    Every pair gives a sound bound, so it may stop at any time: when every bound is above ``enough``, or at the deadline.
    """
    top = torch.full(rows.r.shape, -math.inf, dtype=rows.r.dtype, device=rows.r.device)
    found = now = torch.stack([alpha.expand_as(rows.q), beta.expand_as(rows.q)])
    m, v = torch.zeros_like(now), torch.zeros_like(now)
    for i in range(1, steps + 2):
        lines = _lines(box, now[0])
        bound, p, lam = _back(net, rows, lines, now[1] * box.sign)
        better = bound > top
        top, found = torch.where(better, bound, top), torch.where(better.unsqueeze(-1), now, found)
        if i > steps or bool((top > enough).all()) or time.monotonic() > deadline:
            break
        _, z, _ = _forth(net, p, lam, lines)
        g = torch.stack([torch.where(box.open, lam.clamp(min=0) * z, 0.0), -box.sign * z])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**i)) / ((v / (1 - 0.999**i)).sqrt() + 1e-12)
        now = (now + _LR * _DECAY**i * step).clamp(min=0)
        now[0].clamp_(max=1)
    return found[0], found[1]


def at_once(net: Condensed) -> int:
    """How many rows to bound at once, so that memory is small and the clock is looked at every second."""
    n, u = len(net.centre), len(net.c)
    return max(1, _WORK // ((n + u) * max(8, u)))


def adaptive(box: Box) -> Tensor:
    """The alpha that leaves the least area under each ReLU: 1 where u > -l, else 0; with shape (*, U)."""
    return (box.high > -box.low).to(box.low.dtype)


def condense(network: Network, region: Region, steps: int, deadline: float) -> tuple[Condensed, Rows]:
    """The network, which has no maxima but ReLU, in a region of one input; and its logits.

    What enters a ReLU is bounded by CROWN, and where that leaves its sign open, with ``steps`` of alpha-CROWN.

    Raises:
        OutOfTime: The deadline, by ``time.monotonic``, has passed.
        Overflow: A coefficient or a bound is not finite.
    """
    low, high = region.low.flatten(), region.high.flatten()
    n, none = len(low), low[:0]
    first = torch.cat([low.new_zeros(1, n), torch.eye(n, dtype=low.dtype, device=low.device)])
    # Row 0 of a value is its constant, then come its coefficients of x and of h.
    values = [first.view(-1, *region.low.shape[1:])]
    net = Condensed(
        low.new_zeros(0, n), low.new_zeros(0, 0), none, (), (high + low) / 2, (high - low) / 2, Box(none, none, none)
    )
    for node in network.nodes[1:]:
        if time.monotonic() > deadline:
            raise OutOfTime
        given = [_padded(values[i], 1 + n + len(net.c)) for i in node.inputs]
        if isinstance(node.layer, ReLU):
            net, value = _bend(net, given[0], n, steps, deadline)
        else:
            value = _linear(node.layer, given)
        values.append(value)
    return net, _rows(values[-1], n, len(net.c))


def _padded(value: Tensor, rows: int) -> Tensor:
    """With rows of zeros for the h of layers that were found later."""
    return torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])


def _rows(value: Tensor, n: int, u: int) -> Rows:
    flat = _padded(value, 1 + n + u).flatten(1)
    _check_finite(flat)
    return Rows(flat[1 : n + 1].T, flat[n + 1 :].T, flat[0])


def _check_finite(numbers: Tensor) -> None:
    if not bool(numbers.isfinite().all()):
        raise Overflow


def _linear(layer: Layer | None, given: list[Tensor]) -> Tensor:
    if isinstance(layer, Affine):
        return torch.cat([layer(given[0][:1]), layer.product(given[0][1:], layer.weight)])
    return given[0] + given[1]


def _bend(net: Condensed, value: Tensor, n: int, steps: int, deadline: float) -> tuple[Condensed, Tensor]:
    """The network with the open ReLUs of one more layer, and what comes out of that layer."""
    rows = _rows(value, n, len(net.c))
    low, high = _interval(net, rows)
    _check_finite(high - low)
    # The costly bounds only where the cheap ones leave the sign open.
    for each in sorted({0, steps}) if len(net.c) else ():
        chosen = ((low < 0) & (high > 0)).nonzero().squeeze(1)
        tighter = _ends(net, rows.at(chosen), each, deadline)
        low[chosen], high[chosen] = torch.maximum(low[chosen], tighter[0]), torch.minimum(high[chosen], tighter[1])
    chosen = ((low < 0) & (high > 0)).nonzero().squeeze(1)
    ones = F.one_hot(chosen, len(low)).to(low)
    out = torch.cat([value.flatten(1) * (low >= 0), ones])
    return net.grown(rows.at(chosen), low[chosen], high[chosen]), out.view(-1, *value.shape[1:])


def _interval(net: Condensed, rows: Rows) -> tuple[Tensor, Tensor]:
    """Bounds of rows from those of x and of h alone, each (M,); exact in the first layer."""
    middle, half = rows.p @ net.centre + rows.r, rows.p.abs() @ net.reach
    return middle - half + rows.q.clamp(max=0) @ net.box.high, middle + half + rows.q.clamp(min=0) @ net.box.high


def _ends(net: Condensed, rows: Rows, steps: int, deadline: float) -> tuple[Tensor, Tensor]:
    """Bounds of rows in the box, each (M,)."""
    ends = []
    for part in torch.arange(len(rows.r), device=rows.r.device).split(at_once(net)):
        if time.monotonic() > deadline:
            raise OutOfTime
        up = rows.at(part)
        both = Rows(*(torch.stack([half, -half]) for half in up))
        alpha, beta = adaptive(net.box), torch.zeros_like(net.c)
        if steps:
            alpha, beta = ascend(net, both, net.box, alpha, beta, steps, deadline)
        ends.append(bounds(net, both, net.box, alpha, beta))
    low, high = torch.cat(ends, 1)
    return low, -high
