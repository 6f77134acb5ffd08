"""Linear bounds: the least of a linear function of the logits, by a linear function of the input that is never above it.

Symbols: C z >= A v_0 + b in the region, with C (N, K, classes), A (N, K, *) and b (N, K); l and u are the bounds of a value
that enters a ReLU, alpha in [0, 1] is the slope of the ReLU's lower line, and beta >= 0 the price of a split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advkit.defenses.certificates import ibp
from advkit.defenses.certificates.ibp import Interval
from advkit.defenses.certificates.layers import Affine, MaxPool, Network, Node, ReLU
from advkit.defenses.certificates.region import Region

Known = Mapping[int, Interval]
Splits = Mapping[int, Tensor]
Slopes = dict[int, Tensor]
_ENTRIES = 2**22


@dataclass(frozen=True)
class Bounds:
    """What is known of C z in a region.

    Attributes:
        least: What C z is never below, with shape (N, K).
        a: The coefficients of the linear bound, with shape (N, K, *): C z >= A v_0 + b.
        b: Its constant, with shape (N, K).
        found: The interval of every node's value.
        slopes: The alpha of each node that enters a ReLU, by its number, with shape (N, K, *).
    """

    least: Tensor
    a: Tensor
    b: Tensor
    found: list[Interval]
    slopes: Slopes


def crown(
    network: Network,
    region: Region,
    c: Tensor,
    *,
    tight: bool = True,
    steps: int = 0,
    known: Known | None = None,
    splits: Splits | None = None,
    slopes: Slopes | None = None,
) -> Bounds:
    r"""Bound C z from below by going backward through the network, from C to coefficients of the input.

    Between l < 0 < u, ReLU(v) is at least alpha v and at most u (v - l) / (u - l); where the coefficient is positive the lower
    line is put in, else the upper. Zhang, Weng, Chen, Hsieh and Daniel, 2018, "Efficient neural network robustness
    certification with general activation functions", https://arxiv.org/abs/1811.00866; alpha is 1 where u > -l, else 0. With
    ``steps``, alpha is improved by gradient ascent: Xu, Zhang, Wang, Wang, Jana, Lin and Hsieh, 2021, "Fast and complete:
    enabling complete verification with rapid and massively parallel incomplete verifiers", https://arxiv.org/abs/2011.13824;
    with ``splits``, so is beta: Wang, Zhang, Xu, Lin, Jana, Hsieh and Kolter, 2021, "Beta-CROWN", https://arxiv.org/abs/2103.06624.

    Arguments:
        network: The network.
        region: Where the input may be.
        c: C, with shape (N, K, classes).
        tight: Whether what enters a ReLU is bounded in the same way; otherwise by intervals alone (CROWN-IBP).
        steps: How many steps improve alpha and beta.
        known: Bounds (l, u), each (N, *), of values that enter a ReLU, by the node's number (``network.relus`` lists them);
            the common part with what is found is kept. l >= 0 makes a ReLU the identity, u <= 0 makes it 0.
        splits: For nodes of ``known``: 1 where v >= 0 is assumed, -1 where v <= 0 is, 0 elsewhere, with shape (N, *). Where no
            input is on all these sides, bounds may come out with l > u, and say nothing.
        slopes: The alpha to begin with, by the node's number, with shape (N, K, *).
    """
    tighten = partial(_tightened, network, region) if tight else None
    found = ibp.intervals(network, region.low, region.high, known, tighten)
    slopes = {**_adaptive(network, found), **(slopes or {})}
    least = ibp.margins(network, found, c)
    if steps and slopes:
        return _ascend(network, region, c, found, slopes, splits or {}, steps, least)
    a, b = backward(network, len(network.nodes) - 1, c, found, slopes)
    return Bounds(torch.maximum(least, region.least(a) + b), a, b, found, slopes)


def backward(
    network: Network,
    at: int,
    c: Tensor,
    found: list[Interval],
    slopes: Slopes | None = None,
    prices: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The A (N, K, *) and b (N, K) of a lower bound C v_at >= A v_0 + b.

    Arguments:
        network: The network.
        at: The number of the node whose value is bounded.
        c: C, with shape (N, K, *).
        found: The intervals of the nodes before it.
        slopes: The alpha of the nodes that enter a ReLU; by default the adaptive ones.
        prices: What is taken off the coefficients of nodes that enter a ReLU: the beta of splits, with its sign.
    """
    slopes = _adaptive(network, found) if slopes is None else slopes
    waiting: dict[int, Tensor] = {at: c}
    b = c.new_zeros(c.shape[:2])
    for i in range(at, 0, -1):
        a = waiting.pop(i, None)
        if a is None:
            continue
        if prices is not None and i in prices:
            a = a - prices[i]
        node = network.nodes[i]
        a, constant = _step(network, node, a, found, slopes)
        b = b + constant
        for j in node.inputs:
            waiting[j] = waiting[j] + a if j in waiting else a
    return waiting[0], b


def _step(network: Network, node: Node, a: Tensor, found: list[Interval], slopes: Slopes) -> tuple[Tensor, Tensor | float]:
    """A v as a lower bound A' w + b' in the values w that the node takes."""
    if isinstance(node.layer, Affine):
        return node.layer.back(a, network.nodes[node.inputs[0]].shape)
    if isinstance(node.layer, ReLU):
        return _through_relu(a, found[node.inputs[0]], slopes[node.inputs[0]])
    if isinstance(node.layer, MaxPool):
        return _through_pool(node.layer, a, found[node.inputs[0]])
    return a, 0.0


def _chord(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The slope and the constant of the line that is above a ReLU on [low, high]."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    slope = high / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    return slope, -low * slope


def _through_relu(a: Tensor, interval: Interval, alpha: Tensor) -> tuple[Tensor, Tensor]:
    low, high = (end.unsqueeze(1) for end in interval)
    slope, constant = _chord(low, high)
    alpha = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, alpha))
    under = a.clamp(max=0.0)
    return a.clamp(min=0.0) * alpha + under * slope, (under * constant).flatten(2).sum(2)


def _through_pool(layer: MaxPool, a: Tensor, interval: Interval) -> tuple[Tensor, Tensor]:
    """Lines around each maximum: its entry with the greatest l, m, is below it, and :func:`_above` is above."""
    lows, highs = (layer.windows(end) for end in interval)
    m, best = lows.max(2, keepdim=True)
    first = torch.zeros_like(lows).scatter_(2, best, 1.0)
    slope, constant = _above(lows, highs, m, first)
    a = a.flatten(3).unsqueeze(3)
    over, under = a.clamp(min=0.0), a.clamp(max=0.0)
    moved = layer.back((over * first.unsqueeze(1) + under * slope.unsqueeze(1)).flatten(0, 1), interval[0].shape[1:])
    return moved.view(*a.shape[:2], *moved.shape[1:]), (under * constant.unsqueeze(1)).flatten(2).sum(2)


def _above(lows: Tensor, highs: Tensor, m: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes and the constant of a line above each maximum: the lower one, at the middle of the box, of two.

    One is the greatest u. The other is m and, for each entry, the line above max(v - m, 0); the entry with l = m is above m for
    certain.
    """
    slope, constant = _chord(lows - m, highs - m)
    slope = torch.where(first > 0, 1.0, slope)
    constant = (constant * (1 - first) - slope * m).sum(2, keepdim=True) + m
    most = highs.amax(2, keepdim=True)
    lower = (slope * (lows + highs) / 2).sum(2, keepdim=True) + constant < most
    return slope * lower, torch.where(lower, constant, most)


def _adaptive(network: Network, found: list[Interval]) -> Slopes:
    """The slope of the line under each ReLU that leaves the least area: 1 where u > -l, else 0; with shape (N, 1, *)."""
    ends = {i: found[i] for i in network.relus if i < len(found)}
    return {i: (high > -low).to(low.dtype).unsqueeze(1) for i, (low, high) in ends.items()}


def _tightened(network: Network, region: Region, i: int, interval: Interval, found: list[Interval]) -> Interval:
    """The interval of node i, made smaller by linear bounds of those entries that a ReLU bends."""
    node = network.nodes[i]
    if isinstance(node.layer, ReLU) or (region.p == math.inf and network.boxes[i]):
        return interval
    low, high = (end.flatten(1).clone() for end in interval)
    bent = (low < 0) & (high > 0) if i in network.relus else torch.ones_like(low, dtype=torch.bool)
    # Each example's own entries, first; the shorter lists are filled with others.
    order = bent.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(bent.sum(1).max())]
    widest = max(end.numel() for end, _ in found)
    for chosen in order.split(max(1, _ENTRIES // widest), 1) if order.shape[1] else ():
        c = torch.zeros(*chosen.shape, low.shape[1], dtype=low.dtype, device=low.device)
        c = c.scatter_(2, chosen.unsqueeze(2), 1.0).view(*chosen.shape, *node.shape)
        ends = [region.least(a) + b for a, b in (backward(network, i, sign * c, found) for sign in (1.0, -1.0))]
        # What fills a list stays as it is: an example's bounds do not depend on the others.
        own, l, u = (end.gather(1, chosen) for end in (bent, low, high))
        low = low.scatter(1, chosen, torch.where(own, torch.maximum(l, ends[0]), l))
        high = high.scatter(1, chosen, torch.where(own, torch.minimum(u, -ends[1]), u))
    return low.view_as(interval[0]), high.view_as(interval[1])


def _ascend(
    network: Network,
    region: Region,
    c: Tensor,
    found: list[Interval],
    slopes: Slopes,
    splits: Splits,
    steps: int,
    least: Tensor,
) -> Bounds:
    """The best bounds of the first slopes and those after each of ``steps`` steps of Adam, for each row and function."""
    last = len(network.nodes) - 1
    found = [(low.detach(), high.detach()) for low, high in found]
    wide = {i: alpha.detach().expand(-1, c.shape[1], *alpha.shape[2:]).clone() for i, alpha in slopes.items()}
    betas = {i: torch.zeros_like(wide[i]) for i in splits}
    variables = [variable.requires_grad_() for variable in (*wide.values(), *betas.values())]
    optimizer = torch.optim.Adam(variables, lr=0.1)
    best: Bounds | None = None
    with torch.enable_grad():
        for step in range(steps + 1):
            prices = {i: betas[i] * splits[i].unsqueeze(1) for i in splits}
            a, b = backward(network, last, c, found, wide, prices)
            bound = region.least(a) + b
            best = _better(best, Bounds(bound, a, b, found, wide))
            if step < steps:
                optimizer.zero_grad()
                (-bound.sum()).backward(inputs=variables)
                optimizer.step()
                for alpha in wide.values():
                    alpha.data.clamp_(0.0, 1.0)
                for beta in betas.values():
                    beta.data.clamp_(min=0.0)
    assert best is not None
    return Bounds(torch.maximum(best.least, least), best.a, best.b, found, best.slopes)


def _better(old: Bounds | None, new: Bounds) -> Bounds:
    """The greater bounds of the two, function by function, without their graphs."""
    slopes = {i: alpha.detach().clone() for i, alpha in new.slopes.items()}
    a, b, least = new.a.detach(), new.b.detach(), new.least.detach()
    if old is None:
        return Bounds(least, a, b, new.found, slopes)
    won = least > old.least
    chosen = lambda x, y: torch.where(won.view(*won.shape, *(1,) * (x.ndim - 2)), x, y)
    slopes = {i: chosen(alpha, old.slopes[i]) for i, alpha in slopes.items()}
    return Bounds(chosen(least, old.least), chosen(a, old.a), chosen(b, old.b), new.found, slopes)
