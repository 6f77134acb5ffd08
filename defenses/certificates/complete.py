"""Complete verification: a proof, or a counterexample, for small ReLU networks.

Symbols: those of ``condensed``; m_j = z_y - z_j is a margin, a row of the condensed network. A domain is one margin and a
sign assumed for some of its ReLUs; the domains that are left cover all inputs for which some margin may not be positive.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from advkit import norms
from advkit.attacks import APGD
from advkit.defenses.certificates import ibp
from advkit.defenses.certificates.bounds import IBP, checked
from advkit.defenses.certificates.condensed import (
    Box,
    Condensed,
    OutOfTime,
    Overflow,
    Rows,
    adaptive,
    ascend,
    at_once,
    bounds,
    condense,
    least,
)
from advkit.defenses.certificates.layers import MaxPool, Network, trace
from advkit.defenses.certificates.region import Region
from advkit.defenses.certificates.result import Certified
from advkit.engine import frozen, run
from advkit.errors import UsageError
from advkit.oracle import answer
from advkit.spec import check_positive, check_whole
from advkit.threat import Lp

_DTYPE, _QUICK = torch.float64, torch.float32
_ROOT_STEPS, _CANDIDATES = 20, 4
_ATTACK = APGD(30, loss="margin")
_FEASIBLE = 1e-6
"""By how much the linear programs of leaves are widened: ten times what HiGHS calls feasible."""


@dataclass(frozen=True)
class Complete:
    r"""Branch and bound over linear bounds, until the margin is proved or an input is found that the model gets wrong.

    An attack settles what falls. Each row that is left becomes a :class:`Condensed` network, by CROWN and alpha-CROWN, of the
    ReLUs whose sign its ball leaves open. A domain whose bound is not positive is split at one of them: of a few ReLUs where
    the relaxation gives most away, the one whose halves have the greatest bounds. The halves are bounded with slopes alpha and
    prices beta of the signs assumed, many domains at once. Where every sign is assumed, a linear program decides.

    Bunel, Lu, Turkaslan, Torr, Kohli and Kumar, 2020, "Branch and bound for piecewise linear neural network verification",
    https://arxiv.org/abs/1909.06588; the bounds, Wang, Zhang, Xu, Lin, Jana, Hsieh and Kolter, 2021, "Beta-CROWN",
    https://arxiv.org/abs/2103.06624; the choice of the ReLU, De Palma, Bunel, Desmaison, Dvijotham, Kohli, Torr and Kumar,
    2021, "Improved branch and bound for neural network verification via Lagrangian decomposition",
    https://arxiv.org/abs/2104.06718.

    Slopes and prices are sought in float32; every bound that counts is computed from them in float64, and what the model's
    rounding may do is taken off, as for other bounds. HiGHS keeps constraints up to 1e-7: a leaf's are widened by ten times
    that before it may call them infeasible. A counterexample counts once the model itself answers it wrongly.

    Arguments:
        seconds: The most that a row may take, beside the attack; it stays open then, neither certified nor broken.
        batch: How many domains are split at once.
        steps: How many steps improve the slopes and prices of a domain.

    Raises:
        UsageError: A number out of range.
    """

    seconds: float = 10.0
    batch: int = 128
    steps: int = 4

    def __post_init__(self) -> None:
        check_positive("complete: seconds", self.seconds)
        check_whole("complete: batch", self.batch, 1)
        check_whole("complete: steps", self.steps, 0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, rng: torch.Generator) -> Certified:
        """What is proved, and what is broken, of inputs (N, *) with labels (N,); the attack draws from rng.

        Raises:
            UsageError: As for other bounds; or a ball that is not l_inf's, or a network with maxima other than ReLU.
        """
        check_linf(threat)
        with torch.inference_mode(False), torch.no_grad(), frozen(model):
            found = IBP()(model, x, y, threat, rng)
            network = trace(model, x, _DTYPE)
            check_relus(network)
            attacked = run(_ATTACK, model, x, y, threat, rng=rng)
            bound, certified, broken = found.bound.clone(), found.certified.clone(), attacked.success.clone()
            x_adv = attacked.x_adv.clone()
            for i in (~certified & ~broken).nonzero().squeeze(1).tolist():
                row = slice(i, i + 1)
                search = Search(self, model, network, x[row], y[row], threat)
                bound[i], certified[i] = max(float(bound[i]), search.bound), search.proved
                if search.x_adv is not None:
                    x_adv[row], broken[i] = search.x_adv, True
        return replace(
            found,
            certified=certified,
            bound=bound,
            radius=torch.where(certified, threat.eps, 0.0).to(x.dtype),
            broken=broken,
            x_adv=x_adv,
        )


def check_linf(threat: Lp) -> None:
    """Refuse a ball other than l_inf's.

    Raises:
        UsageError: It is another.
    """
    if isinstance(threat, Lp) and threat.p != math.inf:
        raise UsageError(f"the threat model is {norms.norm_name(threat.p)}; complete verification serves l_inf")


def check_relus(network: Network) -> None:
    """Refuse a network with maxima other than ReLU.

    Raises:
        UsageError: It has one; its name is given.
    """
    for node in network.nodes:
        if isinstance(node.layer, MaxPool):
            raise UsageError(f"the layer {node.name!r} is a maximum; complete verification knows affine layers, ReLU and sums")


class _Domains(NamedTuple):
    """D domains: the number of the margin, (D,), and what is known of z, (D, U), as in ``condensed``."""

    row: Tensor
    low: Tensor
    high: Tensor
    sign: Tensor
    alpha: Tensor
    beta: Tensor
    bound: Tensor
    gap: Tensor
    rise: Tensor

    @property
    def box(self) -> Box:
        """What is known of z, each (D, U)."""
        return Box(self.low, self.high, self.sign)

    def take(self, index: Tensor | slice) -> _Domains:
        """Those with these numbers."""
        return _Domains(*(part[index] for part in self))

    def join(self, other: _Domains) -> _Domains:
        """These, then the others."""
        return _Domains(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


class Search:
    """The search for one input.

    Arguments:
        settings: How.
        model: What has the last word on counterexamples.
        network: The model's layers, in float64.
        x: The input, with shape (1, *).
        y: Its label, with shape (1,), which the model answers.
        threat: An l_inf ball.

    Attributes:
        proved: Whether no allowed input has another answer.
        x_adv: An allowed input that the model gets wrong, with shape (1, *); None where none was found.
        bound: What the margin is never below.
        domains: How many domains were bounded.
    """

    def __init__(self, settings: Complete, model: nn.Module, network: Network, x: Tensor, y: Tensor, threat: Lp) -> None:
        self.settings, self.model, self.x, self.y, self.threat = settings, model, x, y, threat
        self.deadline = time.monotonic() + settings.seconds
        self.proved, self.bound, self.domains = False, -math.inf, 0
        self.x_adv: Tensor | None = None
        z, room = checked(model, network, x, y)
        self.enough = float(room)
        try:
            left = self._root(network, z.shape[1], 0)
            if len(left.row) and self.x_adv is None:
                self._note(left.bound)
                left = self._root(network, z.shape[1], _ROOT_STEPS)
            self._run(left)
        except OutOfTime:
            pass
        except Overflow:
            self.bound = -math.inf

    def _root(self, network: Network, classes: int, steps: int) -> _Domains:
        """The domains of margins that bounds with ``steps`` of ascent leave open."""
        self.net, logits = condense(network, Region.around(self.x, self.threat, _DTYPE), steps, self.deadline)
        c = ibp.versus(self.y, classes, _DTYPE)[0]
        self.margins, self.bound = Rows(c @ logits.p, c @ logits.q, c @ logits.r), math.inf
        self.quick, self.quick_margins = self.net.to(_QUICK), Rows(*(part.to(_QUICK) for part in self.margins))
        rows = torch.arange(len(c), device=c.device)
        box = Box(*(part.expand(len(rows), -1) for part in self.net.box))
        return self._open(self._bounded(rows, box, adaptive(box), torch.zeros_like(box.low), steps))

    def _run(self, left: _Domains) -> None:
        """Split domains until none is left, a counterexample is found or time is up."""
        size = min(self.settings.batch, at_once(self.net))
        while len(left.row) and self.x_adv is None and time.monotonic() < self.deadline:
            # The newest first: few domains wait at a time.
            now, left = left.take(slice(-size, None)), left.take(slice(0, -size))
            left = left.join(self._open(self._split(now)))
        self._note(left.bound)
        self.proved = self.x_adv is None and self.bound > self.enough

    def _bounded(self, row: Tensor, box: Box, alpha: Tensor, beta: Tensor, steps: int) -> _Domains:
        """Domains with bounds, after a look at the inputs where these are least."""
        quick = Box(*(part.to(_QUICK) for part in box))
        margins = self.quick_margins.at(row)
        start = alpha.to(_QUICK), beta.to(_QUICK)
        # Twice what is enough: float32 may be a little above the float64 that decides.
        alpha, beta = ascend(self.quick, margins, quick, *start, steps, self.deadline, 2 * self.enough)
        found = least(self.net, self.margins.at(row), box, alpha.to(_DTYPE), beta.to(_DTYPE))
        if bool(found.bound.isnan().any()):
            raise Overflow
        self.domains += len(row)
        self._try(found.x)
        return _Domains(row, *box, found.alpha, found.beta, found.bound, found.gap, found.rise)

    def _try(self, x: Tensor) -> None:
        """Note the first of inputs (D, n) that the model itself gets wrong, of the few whose margins are least below 0."""
        p, q, r = self.margins
        worst = (x @ p.T + self.net.relus(x) @ q.T + r).amin(1)
        order = worst.argsort()[:8]
        order = order[worst[order] < 0]
        if not len(order):
            return
        z = self.threat.project(x[order].to(self.x.dtype).view(-1, *self.x.shape[1:]), self.x)
        wrong = (answer(self.model, z).argmax(1) != self.y) & self.threat.allows(z, self.x)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            self.x_adv = z[first : first + 1]

    def _open(self, domains: _Domains) -> _Domains:
        """The domains that are left, the least bound last; leaves are decided."""
        free = domains.box.open.any(1)
        closed = domains.bound > self.enough
        self._note(domains.bound[closed])
        for i in (~closed & ~free).nonzero().squeeze(1).tolist():
            if time.monotonic() > self.deadline:
                self._note(domains.bound[i : i + 1])
            else:
                self._leaf(domains.take(slice(i, i + 1)))
        left = domains.take(~closed & free)
        return left.take(left.bound.argsort(descending=True))

    def _note(self, bound: Tensor) -> None:
        self.bound = min(self.bound, *bound.tolist()) if len(bound) else self.bound

    def _leaf(self, leaf: _Domains) -> None:
        """Decide a domain in which the network is linear, by a linear program."""
        bound, x = solve(self.net, self.margins.at(leaf.row[0]), leaf.sign[0], max(self.deadline - time.monotonic(), 0.01))
        self.bound = min(self.bound, max(bound, float(leaf.bound)))
        if x is not None:
            self._try(x.unsqueeze(0))

    def _split(self, domains: _Domains) -> _Domains:
        """Each domain with one more sign assumed: those where it is 1, then those where it is -1."""
        chosen = self._choose(domains)
        d = len(chosen)
        both = domains.join(domains)
        box = _assume(both.box, torch.cat([chosen, chosen]), torch.cat([chosen.new_ones(d), -chosen.new_ones(d)]))
        return self._bounded(both.row, box, both.alpha, both.beta, self.settings.steps)

    def _choose(self, domains: _Domains) -> Tensor:
        """The ReLU to split each domain at, (D,): of those where most is given away, the best in a trial."""
        free = domains.box.open
        n = min(_CANDIDATES, free.shape[1])
        tops = [torch.where(free, score, -1.0).topk(n, 1) for score in (domains.rise, domains.gap)]
        index, allowed = torch.cat([top.indices for top in tops], 1), torch.cat([top.values for top in tops], 1) >= 0
        d, c = index.shape
        wide = [part.to(_QUICK).repeat_interleave(c, 0) for part in (*domains.box, domains.alpha, domains.beta)]
        rows = self.quick_margins.at(domains.row.repeat_interleave(c))
        flat = index.flatten()
        halves = [
            bounds(self.quick, rows, _assume(Box(*wide[:3]), flat, torch.full_like(flat, sign)), wide[3], wide[4]).view(d, c)
            for sign in (1, -1)
        ]
        # Above what is enough a half is closed, and more is worth nothing.
        gain = torch.where(allowed, halves[0].clamp(max=self.enough) + halves[1].clamp(max=self.enough), -math.inf)
        return index.gather(1, gain.argmax(1, keepdim=True)).squeeze(1)


def _assume(box: Box, relu: Tensor, sign: Tensor) -> Box:
    """The boxes with a sign assumed for one ReLU each; relu and sign (D,)."""
    low, high, signs = (part.clone() for part in box)
    i = torch.arange(len(relu), device=relu.device)
    low[i, relu] = torch.where(sign > 0, low[i, relu].clamp(min=0), low[i, relu])
    high[i, relu] = torch.where(sign < 0, high[i, relu].clamp(max=0), high[i, relu])
    signs[i, relu] = sign.to(signs)
    return Box(low, high, signs)


def solve(net: Condensed, row: Rows, sign: Tensor, seconds: float) -> tuple[float, Tensor | None]:
    """The least of one row where the ReLUs have signs (U,), none 0; and where, (n,), if that is known.

    The bound is computed from the program's dual solution; inf where the program has no solution.
    """
    on = (sign > 0).to(sign)
    # z as a function of x alone: slope x + shift.
    slope, shift = net.g.clone(), net.c.clone()
    for k in net.blocks:
        before = net.t[k, : k.start] * on[: k.start]
        slope[k] += before @ slope[: k.start]
        shift[k] += before @ shift[: k.start]
    p, r = row.p + (row.q * on) @ slope, row.r + (row.q * on) @ shift
    a, b = -sign.unsqueeze(1) * slope, sign * shift + _FEASIBLE
    low, high = (net.centre - net.reach).cpu().numpy(), (net.centre + net.reach).cpu().numpy()
    given = (p.cpu().numpy(), a.cpu().numpy(), b.cpu().numpy())
    if not all(np.isfinite(part).all() for part in given):
        return -math.inf, None
    found = linprog(*given, bounds=np.stack([low, high], 1), method="highs", options={"time_limit": seconds})
    if found.status == 2:
        return math.inf, None
    if found.status:
        return -math.inf, None
    dual = -torch.from_numpy(found.ineqlin.marginals).to(p).clamp(max=0)
    q = p + dual @ a
    return float(q @ net.centre - q.abs() @ net.reach - dual @ b + r), torch.from_numpy(found.x).to(p)
