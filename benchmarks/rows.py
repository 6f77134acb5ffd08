"""What an evaluation's own rows show of the attacks behind it, without another pass of the model.

Where an attack breaks what a stronger one left, the stronger one failed there (Athalye, Carlini and Wagner, 2018,
https://arxiv.org/abs/1802.00420); more radius can only make an attack's task easier (Carlini et al., 2019,
https://arxiv.org/abs/1902.06705).
"""

from __future__ import annotations

import functools
import math
import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.probe import ALLOWED, leaves, longer, surely
from advkit.benchmarks.records import Records
from advkit.errors import UsageError
from advkit.oracle import Access

if TYPE_CHECKING:
    import pandas as pd

ONE_STEP = 2
"""The passes of an attack with one gradient."""
HALF = 0.5
"""The share of examples that may stay right where every image can become the same grey one."""


def from_records(records: Records) -> list[Finding]:
    """What the rows of an evaluation or a benchmark show.

    Arguments:
        records: The rows.

    Returns:
        A finding for each model, family of threat models and check that its rows allow.
    """
    views = [_View(records, model, family) for model in records.models for family in records.families]
    found = [check(view) for view in views if len(view.tries) for check in CHECKS]
    return [finding for finding in found if finding is not None]


@functools.cache
def kind(name: str) -> str:
    """What an attack goes by: ``noise``, ``step`` (one gradient), ``gradients``, ``search``; empty where mixed or unknown.

    >>> [kind(name) for name in ("uniform", "fgsm", "restarts(pgd)", "square", "worst([pgd, square])")]
    ['noise', 'step', 'gradients', 'search', '']
    """
    try:
        parts = leaves(spec.parse(name, ATTACKS, "attack"))
    except UsageError:
        return ""
    if all(leaf.paper == "baseline" for leaf in parts):
        return "noise"
    if all(leaf.access < Access.GRADIENTS for leaf in parts):
        return "search"
    if any(leaf.access < Access.GRADIENTS for leaf in parts):
        return ""
    return "step" if all(leaf.cost <= ONE_STEP for leaf in parts) else "gradients"


@dataclass(frozen=True)
class _View:
    """One model and one family of threat models."""

    records: Records
    model: str
    family: str

    @cached_property
    def tries(self) -> pd.DataFrame:
        """The attempts."""
        tries = self.records.tries
        return tries[(tries["model"] == self.model) & (tries["family"] == self.family)]

    @property
    def right(self) -> int:
        """How many examples the model gets right."""
        return self.records.clean_accuracy(self.model).count

    def left(self, eps: float) -> int:
        """How many of them are unbroken at a radius."""
        return int((self.records.closest(self.model, self.family) > eps).sum())

    def of_kind(self, *kinds: str) -> pd.DataFrame:
        """The attempts in a radius of such attacks."""
        inside = self.tries[self.tries["eps"] < math.inf]
        return inside[inside["attack"].map(kind).isin(kinds)]

    def missed(self, *simple: str) -> int | None:
        """How many examples simpler attacks broke that many gradients, at the same radius, did not; None if none met both."""
        won, lost = (
            tries.groupby(["eps", "index"])["success"].any() for tries in (self.of_kind(*simple), self.of_kind("gradients"))
        )
        both = won.index.intersection(lost.index)
        if not len(both):
            return None
        broken = both[(won[both] & ~lost[both]).to_numpy(dtype=bool)]
        return len(set(broken.get_level_values("index")))

    def finding(
        self, check: str, count: int, said: str, fired: bool, advice: str, attack: str, severity: str, eps: float | None = None
    ) -> Finding:
        """A finding about ``count`` of the right examples; its command has the greatest radius, or ``eps``."""
        numbers = {"count": count, "right": self.right}
        if not fired:
            return Finding(check, "fine", self.model, self.family, said, numbers=numbers)
        about = self.records.about
        (named,) = (model["spec"] for model in about["models"] if model["name"] == self.model)
        most = max(self.records.radii(self.family), default=math.inf)
        threat = self.records.threat(self.family, most if eps is None else eps)
        words = ("--model", named, "--data", about["data"]["name"], "--threat", threat, "--attack", attack)
        command = shlex.join(["advkit", "attack", *words])
        return Finding(check, severity, self.model, self.family, said, advice, command, numbers)


def _only_noise(view: _View) -> Finding | None:
    names = view.records.attacks(view.family)
    fired = all(kind(name) == "noise" for name in names)
    said = f"{len(names)} attacks were run" + (", all of them noise" if fired else "")
    advice = "noise is no adversary, and the robust accuracy says little; run attacks"
    return view.finding("only-noise", len(names), said, fired, advice, "standard", "suspect")


def _one_step_wins(view: _View) -> Finding | None:
    count = view.missed("step")
    return _wins(view, "one-step-wins", "a single gradient", count)


def _search_wins(view: _View) -> Finding | None:
    count = view.missed("search", "noise")
    return _wins(view, "search-wins", "attacks without gradients", count)


def _wins(view: _View, check: str, what: str, count: int | None) -> Finding | None:
    if count is None:
        return None
    said = f"{what} broke {count} of {view.right} examples that attacks with many gradients, run on them too, did not"
    advice = "the gradients mislead; see docs/adaptive.md"
    return view.finding(check, count, said, surely(count, view.right, ALLOWED), advice, "standard", "suspect")


def _radius_misses(view: _View) -> Finding | None:
    """What is broken at a radius is broken at every greater one."""
    table = view.tries.groupby(["index", "eps"])["success"].any()
    if table.index.get_level_values("eps").nunique() < 2:
        return None
    lost = table.groupby("index").cummax() & ~table
    count = int(lost.groupby("index").any().sum())
    said = f"{count} of {view.right} examples that were broken at one radius were tried in vain at a greater one"
    advice = "the attacks do worse with more radius: their step does not fit it, or gradients mislead"
    fired = surely(count, view.right, ALLOWED)
    return view.finding("greater-radius-misses", count, said, fired, advice, "standard", "suspect")


def _flat_curve(view: _View) -> Finding | None:
    radii = view.records.radii(view.family)
    if len(radii) < 2 or radii[-1] < 2 * radii[0]:
        return None
    first, last = view.left(radii[0]), view.left(radii[-1])
    said = f"{first} of {view.right} examples are unbroken at radius {radii[0]:.4g} and {last} at {radii[-1]:.4g}"
    advice = "more radius should break more; go on to radii at which nothing is left"
    return view.finding("radius-does-not-help", last, said, first == last > 0, advice, "standard", "warning")


def _half_range(view: _View) -> Finding | None:
    """Within half the range of l_inf every image can become the same grey one, which has one class."""
    data, radii = view.records.about["data"], view.records.radii(view.family)
    if view.family != "linf" or not radii or radii[-1] < (data["high"] - data["low"]) / 2:
        return None
    count = view.left(radii[-1])
    said = (
        f"{count} of {view.right} examples are unbroken at radius {radii[-1]:.4g}, where every image can become the same grey"
    )
    advice = "at most one class can stay right there, so the attacks fail"
    fired = surely(count, view.right, HALF)
    return view.finding("robust-to-anything", count, said, fired, advice, "standard", "suspect")


def _closest_fails(view: _View) -> Finding | None:
    searched = view.tries[view.tries["eps"] == math.inf]
    if not len(searched):
        return None
    count = int((~searched.groupby("index")["success"].any()).sum())
    said = f"the search for the closest example found none, at any distance, for {count} of {view.right} examples"
    advice = "there always is one, so the search fails; give it more steps, or scores"
    fired = surely(count, view.right, ALLOWED)
    return view.finding("closest-not-found", count, said, fired, advice, _more_steps(searched), "suspect", math.inf)


def _not_the_closest(view: _View) -> Finding | None:
    """What an attack breaks within a radius has an adversarial example there, and the search found none as close."""
    searched = view.tries[view.tries["eps"] == math.inf]
    inside = view.tries[(view.tries["eps"] < math.inf) & view.tries["index"].isin(searched["index"])]
    if not len(inside):
        return None
    within = inside[inside["success"]].groupby("index")["eps"].min()
    closest = searched.groupby("index")["distance"].min()
    count = int((closest[within.index] > within).sum())
    said = f"attacks within a radius broke {count} of {view.right} examples for which the search found none as close"
    advice = "between the radii the robust accuracy, and so the area and the median, is too high; give the search more steps"
    fired = surely(count, view.right, ALLOWED)
    return view.finding("not-the-closest", count, said, fired, advice, _more_steps(searched), "warning", math.inf)


def _more_steps(searched: pd.DataFrame) -> str:
    """The first of the searches with four times the steps; the default attacks where it has none, or no spec."""
    try:
        return spec.show(longer(spec.parse(searched["attack"].iloc[0], ATTACKS, "attack"), 4), ATTACKS)
    except UsageError:
        return "standard"


CHECKS = (
    _only_noise,
    _one_step_wins,
    _search_wins,
    _radius_misses,
    _flat_curve,
    _half_range,
    _closest_fails,
    _not_the_closest,
)
