"""Can an evaluation be trusted? Checks of the attack that it relies on, and of the rows that it left.

A robust accuracy is only as good as the attack behind it. Each check looks for a sign that the attack failed where the model
should have; none of them proves that a number is right. What a check counts is judged by one rule, ``probe.surely``: the lower
end of an exact interval must be above what is allowed, so that chance alone rarely raises an alarm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from advkit.attacks import PGD
from advkit.benchmarks.findings import SEVERITIES, Finding
from advkit.benchmarks.indicators import (
    incomplete_optimization,
    silent_success,
    transfer_failure,
    unavailable_gradients,
    unstable_predictions,
)
from advkit.benchmarks.masking import (
    answers_change,
    black_box,
    more_radius,
    not_converged,
    one_step,
    random_search,
    transfer_beats,
    unbounded,
)
from advkit.benchmarks.plan import attack_name, threat_name
from advkit.benchmarks.probe import Case
from advkit.benchmarks.rows import from_records as from_records
from advkit.benchmarks.suites import SUITES
from advkit.data.dataset import check_seed
from advkit.engine import Attack, check_inputs, check_serves
from advkit.errors import AccessError, UsageError, first_line
from advkit.models import Model, wrap
from advkit.oracle import Access, top1
from advkit.threat import Change, Lp

Check = Callable[[Case], Finding | None]

OF_THE_MODEL: Mapping[str, Check] = {
    "unavailable-gradients": unavailable_gradients,
    "unstable-predictions": unstable_predictions,
    "transfer-failure": transfer_failure,
}
"""Checks that can be run where the attack cannot."""

OF_THE_ATTACK: Mapping[str, Check] = {
    "answers-change": answers_change,
    "silent-success": silent_success,
    "incomplete-optimization": incomplete_optimization,
    "not-converged": not_converged,
    "one-step-beats-many": one_step,
    "random-beats-attack": random_search,
    "black-box-beats-gradients": black_box,
    "more-radius-does-not-help": more_radius,
    "unbounded-attack-fails": unbounded,
    "transfer-beats-attack": transfer_beats,
}
"""Checks of what the attack does."""

EXAMPLES = 64
"""How many examples are enough."""


def diagnose(
    model: Model | Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    threat: Lp | Change,
    *,
    attack: Attack | None = None,
    surrogate: Callable[[Tensor], Any] | None = None,
    others: Mapping[str, Callable[[Tensor], Any]] | None = None,
    access: Access | None = None,
    seed: int = 0,
    data: str = "DATA",
    name: str | None = None,
) -> list[Finding]:
    """Look for signs that an attack fails on a model, so that the robust accuracy it gives is too high.

    Of the examples, those that the model gets right are looked at; 64 are enough. All checks together cost about ten times the
    attack, where that is ``pgd(steps=40)``. What the model draws from torch's global generator comes from the seed as well.

    Arguments:
        model: The model, inputs (N, *) to logits (N, K).
        x: The inputs, with shape (N, *), in the threat model's range and on the model's device.
        y: Their labels, with shape (N,) and dtype int64.
        threat: What may change; with a radius, unless it is a change.
        attack: What the evaluation relies on; by default ``pgd(steps=40)``, or with less access an attack that does with it.
        surrogate: The model that the evaluation makes its examples on, where that is another one.
        others: Models whose examples may fool this one, by name.
        access: The most that the adversary sees; by default, all that the model can answer.
        seed: What every random draw comes from, a whole number from 0 to 2**63 - 1.
        data: What the commands in the findings call the data.
        name: What the findings call the model; by default its own name.

    Returns:
        A finding for each check that could be run, suspicious ones first; a warning for each that raised, and one alone where
        the model gets no example right.

    Raises:
        UsageError: The inputs, the attack or the threat model do not fit.

    >>> digits = lambda x: x.flatten(1)[:, :10].round()
    >>> x = torch.rand((32, 1, 5, 5), generator=torch.Generator().manual_seed(0))
    >>> found = diagnose(digits, x, digits(x).argmax(1), Lp(math.inf, 0.1))
    >>> found[0].check, found[0].severity
    ('unavailable-gradients', 'suspect')
    """
    known = wrap(model)
    check_seed(seed)
    check_inputs(x, y, threat)
    if threat.eps == math.inf:
        raise UsageError(f"the threat model is {threat_name(threat)}; the checks look at an attack in a radius, as linf(0.1)")
    seen = known.access if access is None else access
    chosen = _default(x, threat, seen) if attack is None else attack
    check_serves(chosen, threat)
    # Refuses what has no name.
    attack_name(chosen)
    if chosen.access > seen:
        name = chosen.access.name.lower()
        raise AccessError(f"the attack needs {name}; the adversary sees {seen.name.lower()}")
    case = Case(known, x, y, threat, chosen, seen, seed, data, name or known.name, surrogate, others or {})
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        right = top1(case.ask(x), y)
        case = dataclasses.replace(case, x=x[right], y=y[right])
        return sorted(_findings(case), key=lambda found: SEVERITIES.index(found.severity))


def _default(x: Tensor, threat: Lp | Change, access: Access) -> Attack:
    if access == Access.GRADIENTS:
        return PGD(steps=40)
    return SUITES["fast"](threat, access, None if isinstance(threat, Lp) else threat.zero(x[:1]).numel())[-1]


def _findings(case: Case) -> Iterator[Finding]:
    if not len(case):
        said, advice = "the model gets no example right", "there is nothing to attack; see whether the data fit the model"
        yield case.finding("nothing-right", said, True, advice, case.command(), "warning")
        return
    checks = {**OF_THE_MODEL, **OF_THE_ATTACK}
    try:
        case.base  # noqa: B018
    except Exception as error:  # what a model raises is its own
        checks = dict(OF_THE_MODEL)
        yield _raised(case, "attack-raises", "the attack", error)
    for name, check in checks.items():
        try:
            found = check(case)
        except Exception as error:  # as above
            found = _raised(case, name, "the check", error)
        if found is not None:
            yield found


def _raised(case: Case, check: str, what: str, error: Exception) -> Finding:
    evidence = f"{what} could not be run: {type(error).__name__}: {first_line(error)}"
    return case.finding(check, evidence, True, "see whether the model and the attack fit", case.command(), "warning")
