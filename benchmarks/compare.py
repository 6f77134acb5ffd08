"""Whether one run's models are worse than another's, on the same examples.

Two models that answer the same examples are told apart by those that only one of them gets right: ``lost`` are right in base
alone, ``gained`` in head alone. Of two models that are equally good each such example is one or the other as a coin falls:
McNemar's exact test. Distances are compared in the same way, by the sign test: lost are the examples that are broken closer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from advkit import spec
from advkit.benchmarks.records import Records
from advkit.benchmarks.statistics import Estimate, Rate, bootstrap, examples_needed, holm, mcnemar, paired, rate
from advkit.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

WORSE, BETTER, NEITHER = "worse", "better", "no difference shown"
"""What can be said of head beside base."""

SETTINGS = ("access", "budget", "votes", "fast", "seeds", "advkit")
"""What of a run is announced where it differs, beside data and attacks."""

HEADS = ("model", "quantity", "base", "head", "difference [95 %]", "lost", "gained", "p, corrected", "verdict")
"""The columns of a table of lines."""


@dataclass(frozen=True)
class Line:
    """One quantity of two models on the same examples.

    Attributes:
        base: The model's name in base.
        head: Its name in head.
        quantity: ``clean``, ``robust[linf(8/255)]`` or ``closest[linf]``.
        before: The share in base; for ``closest``, the mean of the clipped distances.
        after: The same in head.
        of: How many examples.
        lost: On how many head is worse.
        gained: On how many head is better.
        difference: ``after - before``, with a 95 % interval for this line alone.
        p: The p-value of the exact test that head is not worse, one-sided.
        corrected: The same, corrected for the number of lines (:func:`holm`).
        verdict: ``worse``, ``better`` or ``no difference shown``, at the alpha of the comparison.
        needed: How many examples would show this difference in 4 of 5 comparisons; None where it is shown, or there is none.
    """

    base: str
    head: str
    quantity: str
    before: Rate | float
    after: Rate | float
    of: int
    lost: int
    gained: int
    difference: Estimate
    p: float
    corrected: float
    verdict: str
    needed: int | None

    def cells(self) -> tuple[str, ...]:
        """The line as text, under ``HEADS``."""
        distance = isinstance(self.before, float)
        unit, scale, digits = ("", 1, ".4g") if distance else (" %", 100, ".2f")
        before, after = (f"{scale * float(value):{digits}}{unit}" for value in (self.before, self.after))
        ends = (self.difference.value, self.difference.low, self.difference.high)
        change, low, high = (f"{scale * end:+{digits}}" for end in ends)
        model = self.base if self.base == self.head else f"{self.base} -> {self.head}"
        verdict = f"{self.verdict}; {self.needed:,} examples may show it" if self.needed else self.verdict
        counts = (f"{self.lost:,}", f"{self.gained:,}", f"{self.corrected:.2g}")
        return (model, self.quantity, before, after, f"{change} [{low}, {high}]", *counts, verdict)


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        base: The title of the run before.
        head: The title of the run after.
        alpha: How often, at most, any line says worse where head is not worse.
        rows: A line for each quantity of each pair of models.
        notes: What else differs between the runs, each a sentence.
    """

    base: str
    head: str
    alpha: float
    rows: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> bool:
        """Whether any line says worse."""
        return any(row.verdict == WORSE for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """All fields, and ``worse``, as JSON has them."""
        return {**asdict(self), "worse": self.worse}

    def to_pandas(self) -> pd.DataFrame:
        """A row for each of ``rows``; the ends of the difference's interval are in the columns ``low`` and ``high``."""
        import pandas as pd

        return pd.DataFrame([vars(row) | _numbers(row) for row in self.rows])

    def to_markdown(self) -> str:
        """A table, and the notes as a list, for a comment on a change."""
        from advkit.benchmarks.report import marked_down

        head, base, *notes = map(marked_down, (self.head, self.base, *self.notes))
        lines = [HEADS, ("---",) * len(HEADS), *(map(marked_down, row.cells()) for row in self.rows)]
        table = ["| " + " | ".join(line) + " |" for line in lines]
        listed = ["", *(f"* {note}" for note in notes)] if notes else []
        return "\n".join([f"**{head}** (head) beside **{base}** (base)", "", *table, *listed]) + "\n"


def _numbers(row: Line) -> dict[str, float]:
    ends = {"low": row.difference.low, "high": row.difference.high}
    return {"before": float(row.before), "after": float(row.after), "difference": row.difference.value, **ends}


def compare(base: Records, head: Records, *, alpha: float = 0.05, pairs: Mapping[str, str] | None = None) -> Comparison:
    """Two runs, on the examples that both have.

    There is a line for the clean accuracy, for each radius that was measured in both, and for each family whose closest
    examples were searched for in both. Distances are clipped at the greatest that was found, for their means and not for
    their test; those that differ by a millionth are the same.

    Arguments:
        base: The run before.
        head: The run after.
        alpha: How often, at most, a comparison says worse of any line where head is not worse; in (0, 0.5).
        pairs: The models to compare: for names in base, those in head. By default those of the same name, or the only two.

    Raises:
        UsageError: No models or examples are in both runs, an example has two labels, or an argument is not as above.
    """
    if not 0 < alpha < 0.5:
        raise UsageError(f"alpha is {alpha}; it should be greater than 0 and less than 0.5")
    chosen = _pairs(base, head, pairs)
    measured = [line for names in chosen for line in _lines(base, head, *names)]
    p = [mcnemar(line["lost"], line["gained"], one_sided=True) for line in measured]
    said = verdicts([(line["lost"], line["gained"]) for line in measured], alpha)
    rows = tuple(
        Line(**line, p=one, corrected=corrected, verdict=verdict, needed=_needed(line, verdict, alpha / len(measured)))
        for line, one, corrected, verdict in zip(measured, p, holm(p), said, strict=True)
    )
    return Comparison(base.title, head.title, alpha, rows, tuple(_notes(base, head, chosen)))


def verdicts(counts: Sequence[tuple[int, int]], alpha: float = 0.05) -> list[str]:
    """What can be said of each line, from how many examples it lost and gained.

    The one-sided p-values are corrected for the number of lines, so that any line is called worse that is not with a
    probability of at most alpha; likewise better.

    >>> verdicts([(20, 4), (10, 4), (3, 20)])
    ['worse', 'no difference shown', 'better']
    """
    worse = holm([mcnemar(lost, gained, one_sided=True) for lost, gained in counts])
    better = holm([mcnemar(gained, lost, one_sided=True) for lost, gained in counts])
    return [WORSE if w <= alpha else BETTER if b <= alpha else NEITHER for w, b in zip(worse, better, strict=True)]


def _pairs(base: Records, head: Records, pairs: Mapping[str, str] | None) -> list[tuple[str, str]]:
    """The names in base and in head of the models to compare."""
    if pairs:
        for run, names in ((base, pairs.keys()), (head, pairs.values())):
            for name in names:
                if name not in run.models:
                    raise spec.unknown(f"model of {run.title}:", name, list(run.models))
        return list(pairs.items())
    if len(base.models) == len(head.models) == 1:
        return [(base.models[0], head.models[0])]
    same = [(name, name) for name in base.models if name in head.models]
    if not same:
        there = f"base has {', '.join(base.models)}; head has {', '.join(head.models)}"
        raise UsageError(f"no model has the same name in both runs: {there}; say which belong together with --pair OLD=NEW")
    return same


def _lines(base: Records, head: Records, old: str, new: str) -> list[dict[str, Any]]:
    """All that was measured of two models in both runs, before it is judged."""
    common = _common(base, head, old, new)
    names = {"base": old, "head": new, "of": len(common)}
    right = [_column(run, name, "correct").loc[common].to_numpy() for run, name in ((base, old), (head, new))]
    found = [{**names, "quantity": "clean", **_shares(*right)}]
    for family in _families(base, head):
        near, far = (run.closest(name, family).loc[common].to_numpy() for run, name in ((base, old), (head, new)))
        for eps in _radii(base, head, family):
            left = near > base.check_measured(family, eps), far > head.check_measured(family, eps)
            found.append({**names, "quantity": f"robust[{base.threat(family, eps)}]", **_shares(*left)})
        # Where nothing was broken there is no distance to compare.
        if base.searched(family) and head.searched(family) and any(0 < d < math.inf for d in (*near, *far)):
            found.append({**names, "quantity": f"closest[{family}]", **_distances(near, far)})
    return found


def _column(records: Records, model: str, column: str) -> pd.Series:
    """What a model's clean answers say, by the number of the example."""
    return records.clean[records.clean["model"] == model].set_index("index")[column]


def _common(base: Records, head: Records, old: str, new: str) -> pd.Index:
    """The numbers of the examples that two models both have, after a check that they are the same examples."""
    before, after = _column(base, old, "label"), _column(head, new, "label")
    common = before.index.intersection(after.index)
    if not len(common):
        raise UsageError(f"{base.title} and {head.title} have no example in common; compare runs on the same data")
    for i in common[(before.loc[common] != after.loc[common]).to_numpy()]:
        where = f"{before[i]} in {base.title} and {after[i]} in {head.title}"
        raise UsageError(f"the label of example {i} is {where}; compare runs on the same data")
    return common


def _families(base: Records, head: Records) -> list[str]:
    return [family for family in base.families if family in head.families]


def _radii(base: Records, head: Records, family: str) -> list[float]:
    """The radii of either run at which both know the robust accuracy."""
    every = sorted({*base.radii(family), *head.radii(family)})
    apart = [eps for i, eps in enumerate(every) if not i or not math.isclose(eps, every[i - 1], rel_tol=1e-6)]
    return [eps for eps in apart if _knows(base, family, eps) and _knows(head, family, eps)]


def _knows(records: Records, family: str, eps: float) -> bool:
    if family not in records.families:
        return False
    return records.searched(family) or any(math.isclose(eps, r, rel_tol=1e-6) for r in records.radii(family))


def _shares(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Two models' right answers, (N,), as shares, counts and difference."""
    of, lost, gained = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    shares = {"before": rate(int(before.sum()), of), "after": rate(int(after.sum()), of)}
    return {**shares, "lost": lost, "gained": gained, "difference": paired(lost, gained, of)}


def _distances(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Two models' closest distances, (N,), as means, counts and difference."""
    import numpy as np

    moved = ~np.isclose(before, after, rtol=1e-6, atol=0)
    counts = {"lost": int((moved & (after < before)).sum()), "gained": int((moved & (after > before)).sum())}
    most = max(float(d) for d in (*before, *after) if d < math.inf)
    near, far = np.minimum(before, most), np.minimum(after, most)
    return {"before": float(near.mean()), "after": float(far.mean()), **counts, "difference": bootstrap(far - near)}


def _needed(line: Mapping[str, Any], verdict: str, alpha: float) -> int | None:
    """How many examples would show the difference of a line that does not."""
    lost, gained, of = line["lost"], line["gained"], line["of"]
    if verdict != NEITHER or lost == gained:
        return None
    return examples_needed(lost / of, gained / of, discordant=(lost + gained) / of, alpha=alpha, one_sided=True)


def _notes(base: Records, head: Records, chosen: Sequence[tuple[str, str]]) -> list[str]:
    """What else differs between two runs, or should be known of their numbers."""
    notes = []
    if base.about["data"]["digest"] != head.about["data"]["digest"]:
        notes.append("the data differ; compared are the examples that have the same number and label in both")
    for old, new in chosen:
        of, sizes = len(_common(base, head, old, new)), (len(_column(base, old, "label")), len(_column(head, new, "label")))
        if sizes != (of, of):
            notes.append(
                f"{old} has {sizes[0]:,} examples in base, {new} {sizes[1]:,} in head; compared are the {of:,} of both"
            )
    notes += [
        *_one_side("base", base, head, [old for old, _ in chosen]),
        *_one_side("head", head, base, [new for _, new in chosen]),
    ]
    return notes + _settings(base, head)


def _one_side(side: str, run: Records, other: Records, chosen: Sequence[str]) -> list[str]:
    """What only one run has, and which of its numbers are suspect."""
    alone = [name for name in run.models if name not in chosen]
    for family in run.families:
        alone += [f"robust[{run.threat(family, eps)}]" for eps in run.radii(family) if not _knows(other, family, eps)]
        if run.searched(family) and not (family in other.families and other.searched(family)):
            alone.append(f"closest[{family}]")
    suspect = [(name, family, found.check) for name in chosen for family in run.families for found in run.suspect(name, family)]
    sequential = (run.about.get("gates") or {}).get("sequential")
    stopped = [f"{side} stopped when its gates were decided; the p-values are for a number of examples that is fixed before"]
    return [
        *(stopped if sequential else []),
        *([f"only in {side}, and not compared: {', '.join(alone)}"] if alone else []),
        *(f"{name} in {side} is suspect in {family}: {check}" for name, family, check in dict.fromkeys(suspect)),
    ]


def _settings(base: Records, head: Records) -> list[str]:
    """Which settings of the adversary differ: numbers may then differ that would not for the models' sake."""
    old, new = ({key: run.about[key] for key in SETTINGS if key in run.about} for run in (base, head))
    for family in _families(base, head):
        old[f"attacks in {family}"], new[f"attacks in {family}"] = (", ".join(run.attacks(family)) for run in (base, head))
    changed = [key for key in old if key in new and old[key] != new[key]]
    return [f"{key}: {old[key]} in base, {new[key]} in head; numbers may differ for that reason" for key in changed]
