"""Interval bounds: the least and the greatest value that each entry of each layer can take.

Symbols: [low_i, high_i] holds the value v_i of node i; mu and r are its centre and radius; C are the coefficients of what is
bounded, (N, K, classes), and m = C z, such as the margins z_y - z_j of the logits z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from advkit.defenses.certificates.layers import Affine, Layer, Network

Interval = tuple[Tensor, Tensor]
Tighten = Callable[[int, Interval, list[Interval]], Interval]


def intervals(
    network: Network,
    low: Tensor,
    high: Tensor,
    known: Mapping[int, Interval] | None = None,
    tighten: Tighten | None = None,
) -> list[Interval]:
    r"""The interval of every node's value, each a pair of (N, *).

    W v + b is in W mu + b -+ |W| r; what is monotone maps ends to ends. Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato,
    Arandjelovic, Mann and Kohli, 2018, "On the effectiveness of interval bound propagation for training verifiably robust
    models", https://arxiv.org/abs/1810.12715.

    Arguments:
        network: The network.
        low: The least value of each input, with shape (N, *).
        high: The greatest.
        known: Intervals of nodes that are known from elsewhere; the common part is kept.
        tighten: (i, the interval of node i, those of the nodes before) to a better one; asked where a ReLU or maximum follows.
    """
    found = [(low, high)]
    bent = set(network.bent)
    for i, node in enumerate(network.nodes[1:], 1):
        assert node.layer is not None
        interval = _through(node.layer, [found[j] for j in node.inputs])
        if known is not None and i in known:
            interval = torch.maximum(interval[0], known[i][0]), torch.minimum(interval[1], known[i][1])
        found.append(interval if tighten is None or i not in bent else tighten(i, interval, found))
    return found


def _through(layer: Layer, given: list[Interval]) -> Interval:
    if isinstance(layer, Affine):
        low, high = given[0]
        mu, r = layer((high + low) / 2), layer.spread((high - low) / 2)
        return mu - r, mu + r
    lows, highs = zip(*given, strict=True)
    return layer(*lows), layer(*highs)


def margins(network: Network, found: list[Interval], c: Tensor) -> Tensor:
    """The least that C z can be, with shape (N, K), by intervals; C and a last affine layer are taken as one.

    Arguments:
        network: The network.
        found: The interval of every node.
        c: C, with shape (N, K, classes).
    """
    last = network.nodes[-1]
    if not isinstance(last.layer, Affine):
        return _least(c, *found[-1])
    a, b = last.layer.back(c, network.nodes[last.inputs[0]].shape)
    return _least(a, *found[last.inputs[0]]) + b


def _least(a: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The least of A v over the box, with shape (N, K)."""
    a, mu, r = a.flatten(2), ((high + low) / 2).flatten(1), ((high - low) / 2).flatten(1)
    return torch.einsum("nkd,nd->nk", a, mu) - torch.einsum("nkd,nd->nk", a.abs(), r)


def versus(y: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The C whose products with logits are the margins z_y - z_j of the other classes j, with shape (N, classes - 1, classes).

    >>> versus(torch.tensor([1]), 3)
    tensor([[[-1.,  1.,  0.],
             [ 0.,  1., -1.]]])
    """
    eye = torch.eye(classes, dtype=dtype, device=y.device)
    others = torch.arange(classes, device=y.device).expand(len(y), -1)
    others = others[others != y.unsqueeze(1)].view(len(y), classes - 1)
    return eye[y].unsqueeze(1) - eye[others]
