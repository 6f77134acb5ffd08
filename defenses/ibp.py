"""Certified training with intervals.

Symbols: m are lower bounds of the margins z_y - z_j inside the ball, (N, K - 1), and kappa is the share of the clean loss;
for what enters the i-th ReLU, c and r are the centres and the radii of its intervals, and r_0 are those of the input; E is
the mean over the batch and all entries. ``at`` is the share of the training that is done.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.defenses.certificates import ibp
from advkit.defenses.certificates.layers import Network, learns_statistics, observe, trace
from advkit.defenses.certificates.region import Region, check_ball
from advkit.errors import UsageError
from advkit.oracle import logits_of
from advkit.spec import check_share
from advkit.threat import Lp

TAU = 0.5
"""What the regularizer lets pass: an E r_i of E r_0 / TAU, and active neurons TAU times as strong as inactive ones."""
BEND = 0.25
"""The share of a ramp in which the radius grows as the fourth power."""


@dataclass(frozen=True)
class IBPTraining:
    r"""The worst cross entropy that intervals allow: log(1 + sum_j exp(-m_j)).

    Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann and Kohli, 2018, "On the effectiveness of interval
    bound propagation for training verifiably robust models", https://arxiv.org/abs/1810.12715. The first weights, the
    schedule of the radius and the regularizer are those of Shi, Wang, Zhang, Yi and Hsieh, 2021, "Fast certified robust
    training with short warmup", https://arxiv.org/abs/2103.17268. Batch normalization uses the statistics of the clean batch,
    and the bounds leave dropout out.

    Arguments:
        threat: A ball with a radius.
        warm: The share of the training with the clean loss alone.
        ramp: The share over which the radius then grows from 0.
        kappa: The share of the clean loss at the end, to which it falls from 1 as the radius grows; 0 for none at any time.
        weight: Of the regularizer, which fades as the radius grows.

    Raises:
        UsageError: A threat model that bounds do not serve, or shares that do not fit.
    """

    threat: Lp
    warm: float = 0.02
    ramp: float = 0.4
    kappa: float = 0.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_ball(self.threat)
        for name in ("warm", "ramp", "kappa"):
            check_share(name, getattr(self, name))
        if self.warm + self.ramp > 1:
            raise UsageError(f"warm and ramp are {self.warm} and {self.ramp}; together they should be at most 1")
        if not 0 <= self.weight < math.inf:
            raise UsageError(f"weight is {self.weight}; it should be at least 0")

    @property
    def settled(self) -> float:
        """The share of the training after which the radius has its full size."""
        return self.warm + self.ramp

    def prepare(self, model: nn.Module, rng: torch.Generator) -> None:
        """Draw the weights anew, as :func:`initialize` does."""
        initialize(model, rng)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float = 1.0) -> Tensor:
        """The mean over the batch, with the regularizer and the clean loss beside it, with shape ()."""
        share = strength(at, self.warm, self.ramp)
        if share == 0:
            return F.cross_entropy(logits_of(model(x)), y)
        # Most of these networks have no use for a clean pass, which costs a third of the step.
        logits, statistics = observe(model, x) if self.kappa or learns_statistics(model) else (None, {})
        network = trace(model, x, statistics=statistics)
        region = Region.around(x, dataclasses.replace(self.threat, eps=share * self.threat.eps))
        found = ibp.intervals(network, region.low, region.high)
        m = self.margins(network, region, found, ibp.versus(y, network.nodes[-1].shape[0], x.dtype), share)
        worst = F.softplus(torch.logsumexp(-m, 1)).mean()
        if self.kappa:
            kappa = 1 - share * (1 - self.kappa)
            worst = kappa * F.cross_entropy(logits_of(logits), y) + (1 - kappa) * worst
        weight = self.weight * (1 - share)
        return worst + weight * balance(network, found) if weight else worst

    def margins(self, network: Network, region: Region, found: list[ibp.Interval], c: Tensor, share: float) -> Tensor:
        """m, with shape (N, K - 1), from the intervals and the C that makes margins of logits, at a share of the radius."""
        return ibp.margins(network, found, c)


def strength(at: float, warm: float, ramp: float) -> float:
    """The share of the radius: 0 in the warm part, then to 1, at first as the fourth power and then evenly.

    >>> [round(strength(at, 0.0, 1.0), 3) for at in (0, 0.125, 0.25, 0.625, 1)]
    [0.0, 0.005, 0.077, 0.538, 1.0]
    """
    if at >= warm + ramp:
        return 1.0
    if at <= warm:
        return 0.0
    t = (at - warm) / ramp
    # The two parts meet with the same slope.
    rate = 1 / (4 * BEND**3 * (1 - BEND) + BEND**4)
    return rate * t**4 if t < BEND else rate * BEND**3 * (BEND + 4 * (t - BEND))


def balance(network: Network, found: list[ibp.Interval]) -> Tensor:
    """The regularizer of Shi et al. (2021), with shape (): intervals that stay narrow, and ReLUs neither all on nor all off.

    The mean over the ReLUs of max(0, 1 - E r_0 / (tau E r_i)), and of max(0, 1 - q / tau) for two q: the lesser of the ratio
    and its inverse of what active (l > 0) and inactive (u < 0) neurons add to the mean, and to the variance, of c.
    """
    first = (found[0][1] - found[0][0]).mean()
    terms = []
    for low, high in (found[i] for i in network.relus):
        terms.append(F.relu(1 - first / (TAU * (high - low).mean()).clamp(min=1e-12)))
        c = (low + high) / 2
        spread = (c - c.mean()) ** 2
        active, inactive = low > 0, high < 0
        terms.append(_uneven((c * active).mean(), -(c * inactive).mean()))
        terms.append(_uneven((spread * active).mean(), (spread * inactive).mean()))
    return torch.stack(terms).sum() / max(len(network.relus), 1)


def _uneven(a: Tensor, b: Tensor) -> Tensor:
    """max(0, 1 - q / tau), q the lesser of a / b and b / a; 0 where one is 0, as there is no gradient to mend that."""
    if not (a > 0 and b > 0):
        return a.new_zeros(())
    return F.relu(1 - torch.minimum(a / b, b / a) / TAU)


def initialize(model: nn.Module, rng: torch.Generator) -> None:
    """Draw weights from N(0, 2 pi / n^2), n the inputs of a neuron, and set biases to 0, in place (Shi et al., 2021).

    E |w| = 2 / n: the sum over n inputs doubles a radius and the ReLU halves it, so that intervals keep their width from layer
    to layer.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            std = math.sqrt(2 * math.pi) / layer.weight[0].numel()
            drawn = torch.empty(layer.weight.shape, dtype=layer.weight.dtype).normal_(0.0, std, generator=rng)
            with torch.no_grad():
                layer.weight.copy_(drawn)
                if layer.bias is not None:
                    layer.bias.zero_()
