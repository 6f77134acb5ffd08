"""Gates: what a run has to reach, and whether it surely does, surely does not, or has too few examples to say.

A gate is QUANTITY OP NUMBER: ``robust[linf(8/255)] >= 45 %``. QUANTITY is ``clean``, ``robust[THREAT]``, ``area[FAMILY]``
(under the curve of robust accuracy over the radius) or ``median[FAMILY]`` (of the closest distances); OP is >=, >, <= or <;
NUMBER is ``0.45``, ``45 %`` or ``8/255``. It is for every model, or for the one that it names: ``clean[NAME]``,
``robust[THREAT, NAME]``. Of attacks on a recogniser of speech it is ``success``, ``wer`` or ``snr``.
"""

from __future__ import annotations

import bisect
import math
import operator
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advkit import spec
from advkit.benchmarks.records import Records, split_threat
from advkit.benchmarks.statistics import Estimate, Rate, anytime, bootstrap, rate, sequence
from advkit.errors import UsageError
from advkit.threat import BALLS, THREATS

if TYPE_CHECKING:
    import numpy as np

SPOKEN = {"success": 1.0, "wer": math.inf, "snr": math.inf}
"""What a gate on attacks on a recogniser of speech may be on, and the greatest number that it is compared with."""

QUANTITIES = {"clean": 1.0, "robust": 1.0, "area": 1.0, "median": math.inf, **SPOKEN}
"""What a gate may be on, and the greatest number that it is compared with."""

PLAIN = ("clean", *SPOKEN)
"""The quantities that are of no threat model."""

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
"""How a gate may compare."""

FORM = "write QUANTITY OP NUMBER, as in clean >= 98 %, robust[linf(8/255)] >= 0.45 or median[l2, NAME] > 0.5"
MOST_EXAMPLES = 10**9

Interval = Callable[[int, int], Rate]


@dataclass(frozen=True)
class Gate:
    """What one quantity of one model, or of every model, has to reach.

    Attributes:
        text: The gate as it was written.
        quantity: One of ``QUANTITIES``.
        family: The family of the threat model: ``linf``; empty for ``clean``.
        eps: The radius; inf where the quantity has none.
        model: The model's name; None: every model.
        op: One of ``OPERATORS``.
        number: What it is compared with: a share in [0, 1], for ``median`` a distance.
    """

    text: str
    quantity: str
    family: str
    eps: float
    model: str | None
    op: str
    number: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """The gate that ``text`` describes.

        Raises:
            UsageError: It is not of the form, or its quantity, threat model or number is none.

        >>> gate = Gate.parse("robust[linf(8/255), resnet] >= 45 %")
        >>> gate.quantity, gate.family, round(gate.eps, 4), gate.model, gate.op, gate.number
        ('robust', 'linf', 0.0314, 'resnet', '>=', 0.45)
        """
        found = re.fullmatch(r"\s*([\w-]+)\s*(?:\[(.*)\])?\s*(>=|<=|>|<)([^<>=]*)", text)
        if not found:
            raise UsageError(f"cannot read the gate {text!r}; {FORM}")
        quantity, inside, op, bound = found.groups()
        spec.check_choice("quantity of a gate", quantity, QUANTITIES)
        threat, model = (None, inside) if quantity in PLAIN else _parts(inside or "")
        if threat == "" or (model is not None and not model.strip()):
            raise UsageError(f"the gate {text!r} lacks a name inside the brackets; {FORM}")
        family, eps = ("", math.inf) if threat is None else _threat(threat)
        # A change has one radius, which is in its settings.
        if threat is not None and (eps < math.inf) != (quantity == "robust"):
            ball = f"an l_p ball and no radius, as in {quantity}[linf]"
            needs = "a radius, as in robust[linf(8/255)]" if quantity == "robust" else ball
            raise UsageError(f"the gate {text!r} is on {threat}; {quantity} takes {needs}")
        return cls(text.strip(), quantity, family, eps, model and model.strip(), op, _number(text, quantity, bound))

    def __str__(self) -> str:
        return self.text

    @property
    def bound(self) -> str:
        """What it is compared with, and how: ``>= 45 %``."""
        share = QUANTITIES[self.quantity] == 1
        return f"{self.op} {f'{100 * self.number:.6g} %' if share else spec.number(self.number)}"

    @property
    def subject(self) -> str:
        """What is compared, without the model: ``robust[linf(8/255)]``."""
        if not self.family:
            return self.quantity
        radius = f"({spec.number(self.eps)})" if self.quantity == "robust" and self.family in BALLS else ""
        return f"{self.quantity}[{self.family}{radius}]"


@dataclass(frozen=True)
class Decision:
    """What a gate says of one model.

    Attributes:
        gate: The gate as it was written.
        model: The model's name.
        value: The quantity, with its interval.
        verdict: ``passed`` or ``failed`` where the whole interval is on that side; else ``undecided``.
        suspect: Whether a check found that the robust accuracy cannot be trusted.
        needed: How many examples would decide it if the value stayed as it is; None where it is decided, or none would.
        ok: Whether it does not fail the run: passed, or undecided where that is enough.
        sentence: All this, for people.
    """

    gate: str
    model: str
    value: Rate | Estimate
    verdict: str
    suspect: bool
    needed: int | None
    ok: bool
    sentence: str


def decide(gate: Gate, records: Records, *, strict: bool = False, sequential: bool = False) -> list[Decision]:
    """Whether each model of a run passes a gate.

    The intervals are of 95 %, so what lies exactly on the gate fails it in 1 of 40 runs at most, and in 1 of 20 where one looks
    after every block: noise does not fail a build. Each gate and model is decided for itself; that any of k is decided wrongly
    is at most k times as likely.

    The intervals of ``clean`` and ``robust`` are exact (:func:`rate`), as is that of ``median`` (the sign test's). That of
    ``area`` is from the bootstrap, with an example of area 0 and one of area 1 added, as a few examples
    that agree are not sure.

    Arguments:
        gate: The gate.
        records: The run.
        strict: What is not decided fails the run, and a suspect number passes no gate that asks for more robustness: what
            would pass is undecided.
        sequential: Use intervals that hold at every look (:func:`sequence`), so that a run may stop when it is decided, or when
            other gates are.

    Returns:
        A decision a model, in the order of the run.

    Raises:
        UsageError: The run has no such model, or the quantity was not measured.

    >>> import pandas as pd
    >>> about = {"models": [{"name": "m"}], "families": {}}
    >>> clean = pd.DataFrame({"model": "m", "index": range(200), "correct": True})
    >>> decision, = decide(Gate.parse("clean >= 95 %"), Records("run", about, clean, pd.DataFrame(), pd.DataFrame()))
    >>> decision.sentence
    'clean of m is 100.00 % [98.17, 100.00] over 200 examples and should be >= 95 %: passed'
    """
    if gate.model is not None and gate.model not in records.models:
        raise spec.unknown("model", gate.model, list(records.models))
    family = _measured(gate, records)
    names = records.models if gate.model is None else (gate.model,)
    return [_decide(gate, records, name, family, strict, sequence if sequential else rate) for name in names]


def decisions(records: Records) -> list[Decision]:
    """What the gates that a run was made with say of it."""
    given = records.about.get("gates") or {"require": []}
    options = {"strict": given["strict"], "sequential": given["sequential"]} if given["require"] else {}
    return [decision for gate in given["require"] for decision in decide(Gate.parse(gate), records, **options)]


def _parts(inside: str) -> tuple[str, str | None]:
    """What stands before the first comma outside brackets, and what behind it."""
    depth = 0
    for i, character in enumerate(inside):
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            return inside[:i].strip(), inside[i + 1 :]
    return inside.strip(), None


def _threat(threat: str) -> tuple[str, float]:
    """The family and the radius, however the threat model is written: ``rotation(10)`` is ``rotation(angle=10.0)``."""
    built = spec.parse(threat, THREATS, "threat")
    return split_threat(spec.show(built, THREATS))


def _number(text: str, quantity: str, bound: str) -> float:
    found = re.fullmatch(r"\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(?:(%)|/\s*(\d+))?\s*", bound)
    if not found:
        raise UsageError(f"the gate {text!r} compares with {bound.strip()!r}; it should be a number, as in 0.45, 45 % or 8/255")
    number = float(found[1]) / (100 if found[2] else float(found[3] or 1) or math.nan)
    if not 0 <= number <= QUANTITIES[quantity] or number == math.inf:
        most = QUANTITIES[quantity]
        raise UsageError(
            f"the gate {text!r} compares with {bound.strip()}; {quantity} is a number from 0 to {most:g}, as in 45 %"
        )
    return number


def _measured(gate: Gate, records: Records) -> str:
    """The gate's family as the run names it, after a check that the quantity was measured."""
    if gate.quantity == "clean":
        return ""
    if gate.quantity in SPOKEN:
        raise UsageError(f"{gate.text!r} is for recognisers of speech; of classifiers there are clean, robust, area and median")
    family = next((f for f in records.families if f == gate.family or split_threat(f)[0] == gate.family), gate.family)
    records.check_measured(family, gate.eps if gate.quantity == "robust" else _any_radius(records, family))
    if gate.quantity == "median" and not records.searched(family):
        raise UsageError(f"the closest distances in {family} were not searched for, so {gate.text!r} cannot be decided")
    return family


def _any_radius(records: Records, family: str) -> float:
    return next(iter(records.radii(family)), 0.0) if family in records.families else 0.0


def _decide(gate: Gate, records: Records, model: str, family: str, strict: bool, interval: Interval) -> Decision:
    value, needed = _value(gate, records, model, family, interval)
    said = verdict(gate, value.low, value.high)
    findings = records.suspect(model, family) if family else ()
    if said != "undecided":
        needed = None
    held = bool(findings) and strict and said == "passed" and gate.op in (">=", ">")
    said = "undecided" if held else said
    of = len(records.clean[records.clean["model"] == model])
    sentence = f"{gate.subject} of {model} is {value} over {of:,} examples and should be {gate.bound}: {said}"
    if said == "undecided" and not held:
        sentence += f"; {f'about {needed:,}' if needed else 'no number of'} examples would decide it if the value stayed so"
    if findings:
        names = ", ".join(dict.fromkeys(finding.check for finding in findings))
        sentence += f"; the number is suspect ({names}){', so it cannot pass' if held else ''}"
    fine = said == "passed" or (said == "undecided" and not strict)
    return Decision(gate.text, model, value, said, bool(findings), needed, fine, sentence)


def verdict(gate: Gate, low: float, high: float) -> str:
    """What an interval says of a gate: ``passed``, ``failed`` or ``undecided``."""
    holds = OPERATORS[gate.op]
    ends = (holds(low, gate.number), holds(high, gate.number))
    return "passed" if all(ends) else "undecided" if any(ends) else "failed"


def _value(gate: Gate, records: Records, model: str, family: str, interval: Interval) -> tuple[Rate | Estimate, int | None]:
    """The quantity with its interval, and how many examples would decide the gate."""
    if gate.quantity == "area":
        return _area(gate, records, model, family, interval)
    if gate.quantity == "median":
        distances = sorted(records.closest(model, family))
        nearer = sum(not OPERATORS[gate.op](distance, gate.number) for distance in distances)
        return _median(distances, interval), _needed(nearer, len(distances), 0.5, interval)
    found = records.clean_accuracy(model) if gate.quantity == "clean" else records.robust(model, family, gate.eps)
    return interval(found.count, found.of), _needed(found.count, found.of, gate.number, interval)


def _median(distances: Sequence[float], interval: Interval) -> Estimate:
    """The median of sorted distances; its interval holds the t for which half of them may be less and half greater."""
    n = len(distances)
    if not n:
        return Estimate(math.nan, 0.0, math.inf)
    k = bisect.bisect_left(range(n + 1), 0.5, key=lambda k: interval(k, n).high)
    return Estimate(statistics.median(distances), *((distances[k - 1], distances[n - k]) if k else (0.0, math.inf)))


def _area(gate: Gate, records: Records, model: str, family: str, interval: Interval) -> tuple[Estimate, int | None]:
    areas = _areas(records, model, family)
    if interval is sequence and records.searched(family):
        raise UsageError(f"{gate.text!r} moves with the examples seen so far; to stop when decided, ask for robust or median")
    if not len(areas):
        return Estimate(math.nan, 0.0, 1.0), None
    value = min(float(areas.mean()), 1.0)
    if interval is sequence:
        low, high = anytime(value * len(areas), len(areas))
    else:
        found = bootstrap([*areas, 0.0, 1.0])
        low, high = min(found.low, value), max(found.high, value)
    gap = abs(gate.number - value)
    half = value - low if gate.number < value else high - value
    # The width of an interval goes with one over the root of the number of examples.
    return Estimate(value, low, high), math.ceil(len(areas) * (half / gap) ** 2) if gap else None


def _areas(records: Records, model: str, family: str) -> np.ndarray:
    """What each example adds to :meth:`Records.area`, which is their mean; empty where that is not defined."""
    import numpy as np

    radii = np.array([0.0, *records.steps(family)])
    if radii[-1] == 0:
        return np.empty(0)
    unbroken = records.closest(model, family).to_numpy()[:, None] > radii
    return np.trapezoid(unbroken.astype(float), radii, axis=1) / radii[-1]


def _needed(count: int, of: int, number: float, interval: Interval) -> int | None:
    """How many examples would have an interval without ``number`` if the share stayed; None where none would, or too many."""

    def decided(n: int) -> bool:
        found = interval(round(n * count / of), n)
        return not found.low <= number <= found.high

    most = of
    while of and most < MOST_EXAMPLES and not decided(most):
        most *= 2
    if not of or not decided(most):
        return None
    few = of
    while few < most:
        middle = (few + most) // 2
        few, most = (few, middle) if decided(middle) else (middle + 1, most)
    return most
