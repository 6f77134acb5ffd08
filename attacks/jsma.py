"""JSMA: one entry after the other, by what the saliency map says it gains.

Symbols: x_t is the iterate, L its margin, g the gradient of L, s the saliency of an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.losses import margin
from advkit.oracle import Access, Oracle
from advkit.spec import check_whole
from advkit.streams import Streams
from advkit.threat import Lp


@dataclass(frozen=True)
class JSMA:
    r"""Set the entry of greatest saliency to the end of the range that its gradient points to, and never touch it again.

    s_i = max(g_i * (high - x_i), g_i * (low - x_i)), which is what the entry gains in a linear model. g is that of L, so it
    leads to the target, or without one to the likeliest rival at x_t, and needs one backward pass. The paper's map
    multiplies the slopes of the target's logit and of the sum of all others and only raises entries, or only lowers them;
    on a network for MNIST such a product took more entries. The paper also changes entries in pairs, which take half of the
    gradients and somewhat more entries than single ones, the default.

    Papernot, McDaniel, Jha, Fredrikson, Celik and Swami, 2016, "The limitations of deep learning in adversarial settings",
    https://arxiv.org/abs/1511.07528.

    Arguments:
        steps: How many gradients are taken, at most; with a radius, no more than it allows entries to change.
        entries: How many entries change in a step.
    """

    steps: int = 100
    entries: int = 1
    access = Access.GRADIENTS
    norms = (0.0,)
    minimum = True
    paper = "Papernot et al. 2016"

    def __post_init__(self) -> None:
        check_whole("jsma: steps", self.steps, 1)
        check_whole("jsma: entries", self.entries, 1)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        # width raises where the range is not finite.
        low, high = x.new_tensor(threat.low), x.new_tensor(threat.low + threat.width)
        most = int(min(threat.eps, x[0].numel()))
        x_t, free, rows = x.flatten(1).clone(), torch.ones_like(x, dtype=torch.bool).flatten(1), oracle.live
        for begin in range(0, min(most, self.steps * self.entries), self.entries):
            L, g = oracle.grad(x_t[rows].view(-1, *x.shape[1:]), margin, rows)
            # More entries would only take a row that is fooled further away.
            rows, g = rows[L <= 0], g[L <= 0].flatten(1)
            end = torch.where(g > 0, high, low)
            s = torch.where(free[rows], g * (end - x_t[rows]), -1.0)
            # topk may break ties differently from one device or batch to another; a stable sort does not.
            chosen = s.argsort(dim=1, descending=True, stable=True)[:, : min(self.entries, most - begin)]
            x_t[rows] = x_t[rows].scatter(1, chosen, end.gather(1, chosen))
            free[rows] = free[rows].scatter(1, chosen, False)
        return x_t.view_as(x)
