"""Certificates by bounds: the margin cannot fall to 0 inside the ball.

Symbols: m are lower bounds of the margins z_y - z_j inside the ball, with shape (N, K - 1).

Bounds are computed in float64, for a ball that holds all that ``Lp.allows`` accepts. The model answers in its own precision: a
row counts only where m is greater than what rounding may do to its logits: 1e-5 of the greatest of them, or ten times what it
does at x, whichever is more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from advkit.defenses.certificates import ibp
from advkit.defenses.certificates.crown import crown
from advkit.defenses.certificates.layers import Network, check_plain, trace
from advkit.defenses.certificates.region import Region, check_ball
from advkit.defenses.certificates.result import Certified
from advkit.engine import check_device, check_inputs, frozen
from advkit.errors import UsageError
from advkit.oracle import Goal, answer, check_outputs
from advkit.spec import check_whole, unknown
from advkit.threat import Lp

SLACK = 1e-5
"""What rounding in the model may do to a margin, as a share of 1 + the greatest logit."""
SEEN = 10
"""The same, as a multiple of what it does to the logits of x itself; the greater of the two counts."""
_DTYPE = torch.float64

Margins = Callable[[Network, Region, Tensor], Tensor]
"""(network, region, C) to m."""


@dataclass(frozen=True)
class IBP:
    """Intervals, layer by layer (Gowal et al., 2018, https://arxiv.org/abs/1810.12715): quick, for networks trained for it."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, rng: torch.Generator) -> Certified:
        """What intervals make certain; nothing is drawn."""
        return certify(model, x, y, threat, _by_intervals, 256)


@dataclass(frozen=True)
class CROWN:
    """Linear bounds (Zhang et al., 2018, https://arxiv.org/abs/1811.00866).

    Arguments:
        intermediate: How what enters a ReLU is bounded: by ``crown``, or in much less time by ``ibp``.

    Raises:
        UsageError: Another name.
    """

    intermediate: str = "crown"

    def __post_init__(self) -> None:
        if self.intermediate not in ("crown", "ibp"):
            raise unknown("setting of crown: intermediate", self.intermediate, ["crown", "ibp"])

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, rng: torch.Generator) -> Certified:
        """What linear bounds make certain; nothing is drawn."""
        return certify(model, x, y, threat, _quick_lines if self.intermediate == "ibp" else _lines, 16)


@dataclass(frozen=True)
class AlphaCROWN:
    """Linear bounds whose slopes are improved by gradients (Xu et al., 2021, https://arxiv.org/abs/2011.13824).

    Arguments:
        steps: How many steps of Adam.

    Raises:
        UsageError: A number of steps less than 1.
    """

    steps: int = 20

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, rng: torch.Generator) -> Certified:
        """What linear bounds make certain; nothing is drawn."""
        return certify(model, x, y, threat, partial(_lines, steps=self.steps), 16)


def certify(model: nn.Module, x: Tensor, y: Tensor, threat: Lp, margins: Margins, batch_size: int) -> Certified:
    """What bounds of the margins make certain.

    Arguments:
        model: Inputs (N, *) to logits (N, classes), made of layers that have bounds; used in evaluation mode, left as it was.
        x: The inputs, with shape (N, *), inside the threat model's range.
        y: The labels, with shape (N,) and dtype int64.
        threat: A ball of l_inf, l_2 or l_1 with a radius.
        margins: What bounds them.
        batch_size: How many rows are bounded at once.

    Raises:
        UsageError: The inputs are not of this form, or there are no bounds for the threat model or a layer.
    """
    check_ball(threat)
    check_inputs(x, y, threat)
    check_device(model, x)
    with torch.inference_mode(False), torch.no_grad(), frozen(model):
        network = trace(model, x, _DTYPE)
        check_plain(model)
        batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
        parts = [_batch(model, network, x, y, threat, margins) for x, y in batches]
    bound, predicted, certified = (torch.cat(part) for part in zip(*parts, strict=True))
    return Certified(certified, predicted, bound, torch.where(certified, threat.eps, 0.0).to(x.dtype))


def _batch(
    model: nn.Module, network: Network, x: Tensor, y: Tensor, threat: Lp, margins: Margins
) -> tuple[Tensor, Tensor, Tensor]:
    """The least margin, the answer, and whether it is certain, each (N,)."""
    z, room = checked(model, network, x, y)
    region = Region.around(x, threat, _DTYPE)
    bound = margins(network, region, ibp.versus(y, z.shape[1], _DTYPE)).amin(1)
    predicted = z.argmax(1)
    return bound, predicted, (bound > room) & (predicted == y)


def slack(z: Tensor) -> Tensor:
    """What rounding in a model with logits z, (N, classes), may take off a margin, with shape (N,)."""
    return SLACK * (1 + z.double().abs().amax(1))


def checked(model: nn.Module, network: Network, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The model's logits, (N, classes), and what its rounding may take off a margin, (N,): more where it is seen to at x.

    Raises:
        UsageError: The logits are not those of the graph: the model computes something that its layers do not show. Or y are
            not classes that it has, with shape (N,).
    """
    z, expected = answer(model, x), network(x.to(_DTYPE))
    check_outputs(z, y, Goal())
    if z.shape != expected.shape:
        shapes = f"{tuple(z.shape)} and those of its layers {tuple(expected.shape)}"
        raise UsageError(f"the model's logits have shape {shapes}; bounds need a model that computes what its layers say")
    off, rounding = (expected - z).abs().amax(1), slack(z)
    if bool((off > 100 * rounding).any()):
        what = f"the model's logits differ by up to {float(off.max()):.2g} from those of its layers"
        raise UsageError(f"{what}; bounds need a model that computes what its layers say")
    return z, torch.maximum(rounding, SEEN * off)


def _by_intervals(network: Network, region: Region, c: Tensor) -> Tensor:
    return ibp.margins(network, ibp.intervals(network, region.low, region.high), c)


def _quick_lines(network: Network, region: Region, c: Tensor) -> Tensor:
    return crown(network, region, c, tight=False).least


def _lines(network: Network, region: Region, c: Tensor, steps: int = 0) -> Tensor:
    # Tighter layers choose other slopes, which now and then are the worse ones.
    return torch.maximum(crown(network, region, c, steps=steps).least, _quick_lines(network, region, c))
