"""Running an attack: on an evaluation's terms (``run``) or on a training's (``perturb``)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from advkit import norms
from advkit.errors import UsageError
from advkit.oracle import Access, Goal, Model, Oracle, Stop, Through
from advkit.spec import check_whole
from advkit.streams import Streams
from advkit.threat import Change, Lp


class Attack(Protocol):
    """What every attack is: frozen data whose fields are its settings, called on an oracle.

    The class says what it serves: ``access``, the least it needs; ``norms``, the p it knows; ``minimum``, whether it searches
    for the closest example, so that no radius need be given; ``paper``, its source; ``cost``, the most forward and backward
    passes it makes for a row.
    """

    @property
    def access(self) -> Access: ...  # noqa: D102
    @property
    def norms(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def minimum(self) -> bool: ...  # noqa: D102
    @property
    def paper(self) -> str: ...  # noqa: D102
    @property
    def cost(self) -> int: ...  # noqa: D102

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *), inside the threat model; the oracle keeps the best one."""


@dataclass(frozen=True)
class AttackResult:
    """What came of an attack, row by row.

    Attributes:
        x_adv: The closest success, with shape (N, *); x where there is none.
        success: Whether it meets the goal, in a last forward pass of its own, with shape (N,).
        distance: Its distance from x, inf where there is none. A row that met the goal before the attack has distance 0.
        clean: The outputs for x, with shape (N, K).
        outputs: The outputs for x_adv, with shape (N, K).
        forwards: How many forward passes of the attack each row was part of.
        backwards: How many backward passes.
        checks: How many forward passes the evaluation itself made: the clean one, those that confirm successes, and the last.
        once: Whether the model was fooled at least once, with shape (N,); more than ``success`` only where its answers change
            from call to call, and one lucky answer is not enough.
        share: The share of the last answers that meet the goal at x_adv, with shape (N,); 0 where there is no success.
        change: Where the threat model is a ``Change``, its parameters at x_adv, with shape (N, *); else None.
    """

    x_adv: Tensor
    success: Tensor
    distance: Tensor
    clean: Tensor
    outputs: Tensor
    forwards: Tensor
    backwards: Tensor
    checks: Tensor
    once: Tensor
    share: Tensor
    change: Tensor | None = None


@contextlib.contextmanager
def frozen(model: Model | None) -> Iterator[None]:
    """The model in evaluation mode with fixed parameters; each module's and parameter's own flag is put back at the end.

    Anything that is not an ``nn.Module`` is left alone.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    requires_grad = [parameter.requires_grad for parameter in parameters]
    if any(parameter.is_inference() for parameter in parameters):
        raise UsageError("the model was made under torch.inference_mode, where no gradient can pass; make it outside")
    try:
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False)
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter, flag in zip(parameters, requires_grad, strict=True):
            parameter.requires_grad_(flag)


def check_serves(attack: Attack, threat: Lp | Change) -> None:
    """Refuse an attack that does not serve the threat model.

    Raises:
        UsageError: The norm is not one of the attack's, or the attack needs a radius and there is none, or these are not an
            attack and a threat model.
    """
    if isinstance(attack, type) or not callable(attack) or not hasattr(attack, "norms"):
        raise UsageError(f"the attack is {attack!r}; it should be an attack, as in PGD(steps=40)")
    if not hasattr(threat, "allows"):
        raise UsageError(f"the threat model is {threat!r}; it should be one, as in Lp(inf, 8 / 255)")
    name = type(attack).__name__
    p = threat.p if isinstance(threat, Lp) else threat.ball.p
    if p not in attack.norms:
        served = ", ".join(norms.norm_name(p) for p in attack.norms)
        raise UsageError(f"{name} does not serve {norms.norm_name(p)}; it serves {served}")
    if threat.eps == math.inf and not attack.minimum:
        raise UsageError(f"{name} searches inside a fixed radius and none was given; give one, as in linf(0.3)")


def check_inputs(x: Tensor, y: Tensor, threat: Lp | Change) -> None:
    """Refuse inputs that no attack can start from.

    Raises:
        UsageError: x is not a batch of finite floats inside the threat model's range, or y is not a tensor of one row an
            example.
    """
    for name, value in (("inputs", x), ("labels", y)):
        if not isinstance(value, Tensor):
            raise UsageError(f"the {name} are of type {type(value).__name__}; they should be a tensor")
    if x.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"the inputs are {x.dtype}; they should be float32 or float64 (a model in less can cast them itself)")
    if x.ndim < 2 or not x.numel():
        raise UsageError(f"the inputs have shape {tuple(x.shape)}; they should be (N, *) with at least one example")
    if y.ndim == 0 or len(y) != len(x):
        raise UsageError(f"there are {len(x)} inputs and labels of shape {tuple(y.shape)}; there should be one label for each")
    # One look at the inputs, as training has it at every step: both ends are NaN where an entry is.
    least, most = (float(end) for end in x.aminmax())
    if not math.isfinite(most - least):
        raise UsageError("the inputs hold NaN or infinite values; they should be finite")
    _check_range(x, least, most, threat)


def _check_range(x: Tensor, least: float, most: float, threat: Lp | Change) -> None:
    # In the data's own type: 0.1 as a float32 is greater than 0.1.
    low, high = torch.tensor([threat.low, threat.high], dtype=x.dtype).tolist()
    if least < low or most > high:
        raise UsageError(f"the inputs are in [{least:.4g}, {most:.4g}]; the threat model's range is [{low:g}, {high:g}]")


def check_device(model: Model, x: Tensor) -> None:
    """Refuse a model and inputs that are on two devices."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is not None and parameter.device != x.device:
        raise UsageError(f"the model is on {parameter.device} and the inputs are on {x.device}; put both on one device")


@contextlib.contextmanager
def _attacking(model: Model | None) -> Iterator[None]:
    """Autograd on, whatever the caller's mode, and the model frozen."""
    with torch.inference_mode(False), torch.no_grad(), frozen(model):
        yield


def _own(x: Tensor) -> Tensor:
    """``x`` without its graph; a tensor made under inference_mode cannot join one, so it is copied."""
    return x.clone() if x.is_inference() else x.detach()


def run(
    attack: Attack,
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Lp | Change,
    *,
    goal: Goal | None = None,
    access: Access = Access.GRADIENTS,
    budget: int | None = None,
    rng: torch.Generator | Streams | None = None,
    fast: Model | None = None,
    votes: int = 1,
) -> AttackResult:
    """Attack a batch and keep the closest success of each row.

    Arguments:
        attack: The attack.
        model: Inputs (N, *) to logits (N, K); a module is used in evaluation mode and left as it was.
        x: The clean inputs, with shape (N, *), inside the threat model's range.
        y: The labels, with shape (N,) and dtype int64; the targets, where the goal is targeted.
        threat: What may change. With eps = inf the closest success is searched for; with a radius, the first one ends a row.
            With a ``Change`` the attack searches its parameters, and its ball says which are allowed.
        goal: What counts as success; by default, any answer but y.
        access: The most that the attack may ask for.
        budget: The most forward passes that the attack may make for each row.
        rng: Where random draws come from; by default, a generator with seed 0.
        fast: A cheaper stand-in for the model, as ``advkit.fast.fast`` makes; every success is confirmed by the model itself.
        votes: For a model whose answers change from call to call: how often a success is tried again. It counts if more than
            half of the answers meet the goal.

    Raises:
        UsageError: The inputs, or the model's answers, are not of this form, or the attack does not serve the threat model.
        AccessError: The attack asked for more than ``access``.
    """
    goal = Goal() if goal is None else goal
    check_serves(attack, threat)
    check_inputs(x, y, threat)
    check_device(model, x)
    check_whole("votes", votes, 1)
    if budget is not None and budget < 1:
        raise UsageError(f"the budget is {budget} forward passes; it should be at least 1")
    with _attacking(model), _attacking(fast):
        x, y = _own(x), _own(y)
        start, ball, render = _space(x, threat)
        oracle = Oracle(model, start, y, ball, goal, access, budget, fast=fast, votes=votes, render=render)
        clean = oracle.begin()
        with contextlib.suppress(Stop):
            last = attack(oracle, start, ball, _streams(rng, x))
            # The exact model has the last word on rows that a stand-in was asked about.
            oracle.exact[:] = True
            oracle.fooled(last)
        return _verified(oracle, model, x, clean)


def _space(x: Tensor, threat: Lp | Change) -> tuple[Tensor, Lp, Through | None]:
    """Where the attack searches: its start, its ball, and how the oracle makes inputs of candidates."""
    if isinstance(threat, Lp):
        return x, threat, None
    return threat.zero(x), threat.ball, lambda theta, rows: threat.apply(x[rows], theta)


def _streams(rng: torch.Generator | Streams | None, x: Tensor) -> Streams:
    if isinstance(rng, Streams):
        if len(rng.keys) != len(x):
            raise UsageError(f"there are {len(rng.keys)} random streams for {len(x)} inputs; there should be one for each")
        return rng
    if rng is not None and not isinstance(rng, torch.Generator):
        raise UsageError(f"rng is of type {type(rng).__name__}; it should be a torch.Generator")
    return Streams.of(torch.Generator().manual_seed(0) if rng is None else rng, len(x), x.device)


def _verified(oracle: Oracle, model: Model, x: Tensor, clean: Tensor) -> AttackResult:
    """Decide success, once: forward passes of their own over what was found, and the threat model's word."""
    outputs, success = clean.clone(), oracle.found.clone()
    share = success.to(x.dtype)
    rows = (oracle.found & ((oracle.distance > 0) | (oracle.votes > 1))).nonzero().squeeze(1)
    if len(rows):
        votes = [oracle.verify(oracle.best[rows], rows) for _ in range(oracle.votes)]
        share[rows] = torch.stack([met for _, met in votes]).to(x.dtype).mean(0)
        allowed = oracle.threat.allows(oracle.best[rows], oracle.x[rows])
        success[rows] = allowed & (2 * share[rows] > 1)
        # Of several answers, the first that meets the goal.
        for answered, met in reversed(votes):
            outputs[rows] = norms.where(met, answered, outputs[rows])
    best = norms.where(success, oracle.best, oracle.x)
    return AttackResult(
        x_adv=best if oracle.render is None else oracle.render(best, torch.arange(len(best), device=best.device)),
        success=success,
        # An allowed distance can exceed eps by the rounding of a subtraction; at a radius of eps it is a success.
        distance=torch.where(success, oracle.distance.clamp(max=oracle.threat.eps), math.inf),
        clean=clean,
        outputs=torch.where(success.unsqueeze(1), outputs, clean) if clean.ndim == 2 else outputs,
        forwards=oracle.forwards,
        backwards=oracle.backwards,
        checks=oracle.checks,
        once=oracle.once | success,
        share=torch.where(success, share, 0.0),
        change=None if oracle.render is None else best,
    )


def perturb(
    attack: Attack,
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Lp | Change,
    *,
    rng: torch.Generator | Streams,
    goal: Goal | None = None,
) -> Tensor:
    """The attack's last iterate, with shape (N, *): what adversarial training learns from.

    No row stops early, nothing is counted, and a row that was not fooled is not given back clean (training on clean inputs
    where the attack failed would teach the model the opposite). The arguments are those of :func:`run`; for the loss ``kl``,
    y are the logits of a reference, with shape (N, K).

    Raises:
        UsageError: As in :func:`run`.
    """
    check_serves(attack, threat)
    check_inputs(x, y, threat)
    check_device(model, x)
    with _attacking(model):
        x, y = _own(x), _own(y)
        start, ball, render = _space(x, threat)
        last = attack(Oracle(model, start, y, ball, goal, track=False, render=render), start, ball, _streams(rng, x))
        return last if isinstance(threat, Lp) else threat.apply(x, last)
