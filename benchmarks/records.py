"""The rows of a benchmark or of one evaluation, and every number that a report says, computed from them.

What counts of an example is its *closest* distance: the least at which any attack changed the model's answer, over attacks,
radii and seeds; 0 where the answer is wrong from the start, inf where no attack broke it. The robust accuracy at a radius eps
is the share of examples whose closest distance is greater than eps: the worst case over the attacks for each example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit import spec
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.folder import Row
from advkit.benchmarks.result import Evaluation
from advkit.benchmarks.statistics import Rate, rate
from advkit.benchmarks.store import Columns, Store, read_about
from advkit.errors import UsageError
from advkit.threat import BALLS, THREATS, Lp

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from advkit.benchmarks.certify import Certification

CLEAN = ("model", "start", "index", "label", "clean", "correct")
TRIES = ("model", "family", "eps", "attack", "seed", "start", "index", "success", "distance", "adversarial")
PASSES = ("forwards", "backwards", "checks")
COSTS = ("model", "family", "eps", "attack", "seed", "start", "examples", "seconds", "memory")


@dataclass(frozen=True)
class Shown:
    """An adversarial example that was kept.

    Attributes:
        model: The model it fools.
        family: The family of its threat model.
        attack: The attack that found it.
        index: The number of the example.
        label: Its label.
        adversarial: What the model says of ``x_adv``.
        distance: How far ``x_adv`` is from ``x``.
        x: The input, with the shape of one example.
        x_adv: The adversarial example, of the same shape.
    """

    model: str
    family: str
    attack: str
    index: int
    label: int
    adversarial: int
    distance: float
    x: Tensor
    x_adv: Tensor


@dataclass(frozen=True)
class Records:
    """A benchmark's rows as tables.

    Attributes:
        title: What the run is called.
        about: What was run: ``data`` (name, digest, kind, low, high, examples), ``models`` (a list of name, spec, digest, and
            training_seconds or None), ``families`` (the radii, None for a search, and the attacks of each), ``seeds``,
            ``alone``, ``gates``, ``advkit``, ``torch``, ``command``.
        clean: A row a model and example: model, start (of its block), index, label, clean (the answer), correct.
        tries: A row an attempt: model, family (``linf``: the threat model without its radius), eps (inf: the closest is
            searched for), attack, seed, start, index, success, distance (inf without success), adversarial (-1 without
            success), forwards, backwards, checks.
        costs: A row a model, family, eps, attack, seed and block: examples, seconds, memory (the most bytes of the device
            that were in use; 0 where that is not known).
        findings: What the checks found.
        notes: What was announced, each a sentence.
        certificates: What was certified of these models on these examples.
        folder: Where the files are; None in memory.
        gallery: The adversarial examples that were kept of a model and a family.
    """

    title: str
    about: dict[str, Any]
    clean: pd.DataFrame
    tries: pd.DataFrame
    costs: pd.DataFrame
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    certificates: tuple[Certification, ...] = ()
    folder: Path | None = None
    gallery: Callable[[str, str], list[Shown]] = field(default=lambda model, family: [], repr=False, compare=False)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, in the order of the suite."""
        return tuple(model["name"] for model in self.about["models"])

    @property
    def families(self) -> tuple[str, ...]:
        """The families of threat models: ``linf``, ``rotation(30)``."""
        return tuple(dict.fromkeys(self.about["families"]))

    @cached_property
    def _memory(self) -> dict[tuple[Any, ...], Any]:
        """What was computed from these tables."""
        return {}

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(self.about["seeds"])

    def radii(self, family: str) -> tuple[float, ...]:
        """The radii that a family was attacked at, least first; without inf."""
        return tuple(sorted(eps for eps in self.about["families"][family]["radii"] if eps is not None))

    def columns(self, family: str) -> tuple[float, ...]:
        """The radii of a table: those that were attacked, else every fifth of the curve's."""
        return self.radii(family) or self.steps(family)[4::5]

    def searched(self, family: str) -> bool:
        """Whether the closest examples of a family were searched for, so that the robust accuracy at every radius is known."""
        return None in self.about["families"][family]["radii"]

    def attacks(self, family: str) -> tuple[str, ...]:
        """The attacks of a family, in their order."""
        return tuple(self.about["families"][family]["attacks"])

    def threat(self, family: str, eps: float) -> str:
        """The spec of a family's threat model with a radius: ``linf(8/255)``."""
        return shown(family, eps)

    def clean_accuracy(self, model: str) -> Rate:
        """How many examples a model gets right."""
        correct = self._clean(model)["correct"]
        return rate(int(correct.sum()), len(correct))

    def closest(self, model: str, family: str, *, seed: int | None = None, attack: str | None = None) -> pd.Series:
        """The closest distance of each example, by its number: 0 where the clean answer is wrong, inf where it is unbroken.

        Arguments:
            model: The model's name.
            family: The family of the threat model.
            seed: Count only attempts with this seed.
            attack: Count only this attack's.
        """
        key = (model, family, seed, attack)
        if key not in self._memory:
            tries = self._tries(model, family)
            for column, wanted in (("seed", seed), ("attack", attack)):
                tries = tries if wanted is None else tries[tries[column] == wanted]
            clean = self._clean(model)
            found = tries[tries["success"]].groupby("index")["distance"].min()
            distance = found.reindex(clean.index, fill_value=math.inf).astype(float)
            self._memory[key] = distance.mask(~clean["correct"], 0.0)
        return self._memory[key]

    def robust(self, model: str, family: str, eps: float, *, seed: int | None = None) -> Rate:
        """The robust accuracy at a radius: how many examples are right and no attack broke inside it.

        Raises:
            UsageError: It was not measured.
        """
        measured = self.check_measured(family, eps)
        closest = self.closest(model, family, seed=seed)
        return rate(int((closest > measured).sum()), len(closest))

    def certified(self, model: str, family: str, eps: float) -> Rate | None:
        """How many examples are right and certified at a radius, or a greater one; None where no certificate says."""
        found = self.proven(model, family, eps)
        return None if found is None else rate(len(found), len(self._clean(model)))

    def proven(self, model: str, family: str, eps: float) -> set[int] | None:
        """The numbers of the examples that are certified at a radius, by any certificate; None where there is none."""
        digests = {one["name"]: one["digest"] for one in self.about["models"]}
        able = [
            one
            for one in self.certificates
            if one.run["model"]["digest"] == digests[model]
            and split_threat(one.run["threat"])[0] == family
            and one.threat.eps >= eps * (1 - 1e-9)
        ]
        rows = {row["index"] for one in able for row in one.rows if row["certified"]}
        return rows.intersection(self._clean(model).index) if able else None

    def check_measured(self, family: str, eps: float) -> float:
        """The radius as it was measured, which may differ from ``eps`` by rounding.

        Raises:
            UsageError: The family was not attacked at this radius, nor the closest example searched for.
        """
        if family not in self.families:
            raise UsageError(f"{family} was not measured; measured are {', '.join(self.families)}")
        # What is no ball has one radius, which is in its settings.
        near = [r for r in self.radii(family) if math.isclose(r, eps, rel_tol=1e-6) or family not in BALLS]
        if near or (self.searched(family) and 0 <= eps < math.inf):
            return near[0] if near else eps
        known = ", ".join(self.threat(family, r) for r in self.radii(family))
        raise UsageError(f"{self.threat(family, eps)} was not measured; measured are {known or 'no radii'}")

    def curve(self, model: str, family: str, radii: Sequence[float] | None = None) -> list[tuple[float, Rate]]:
        """The robust accuracy over the radius, from 0.

        Arguments:
            model: The model's name.
            family: The family of the threat model.
            radii: The radii; by default, those of :meth:`steps`.
        """
        closest = self.closest(model, family)
        chosen = self.steps(family) if radii is None else radii
        return [(eps, rate(int((closest > eps).sum()), len(closest))) for eps in (0.0, *chosen)]

    def steps(self, family: str) -> tuple[float, ...]:
        """The radii of a family's curve, the same for all models: those that were attacked.

        Where the closest examples were searched for, also even steps up to where 99 of 100 are broken for every model.
        """
        radii = set(self.radii(family))
        if self.searched(family):
            every = sorted(d for model in self.models for d in self.closest(model, family) if 0 < d < math.inf)
            most = max([every[min(len(every) - 1, math.ceil(0.99 * len(every)))], *radii]) if every else 0.0
            radii |= {most * step / 20 for step in range(1, 21)} if most else set()
        return tuple(sorted(radii))

    def area(self, model: str, family: str) -> float:
        """The area under the curve of robust accuracy over the radius, as a share of the greatest radius, in [0, 1]."""
        points = [(eps, r.value) for eps, r in self.curve(model, family)]
        pairs = itertools.pairwise(points)
        most = points[-1][0]
        return sum((b - a) * (u + v) / 2 for (a, u), (b, v) in pairs) / most if most else math.nan

    def spread(self, model: str, family: str, eps: float) -> tuple[Rate, ...]:
        """The robust accuracy with each seed's attempts alone."""
        return tuple(self.robust(model, family, eps, seed=seed) for seed in self.seeds)

    def suspect(self, model: str, family: str) -> tuple[Finding, ...]:
        """The findings for which a robust accuracy cannot be trusted."""
        named = [f for f in self.findings if f.model == model and split_threat(f.threat)[0] == family]
        return tuple(f for f in named if f.severity == "suspect")

    def shown(self, model: str, family: str) -> list[Shown]:
        """The adversarial examples that were kept, closest first, one for each example."""
        best: dict[int, Shown] = {}
        for one in sorted(self.gallery(model, family), key=lambda one: (one.distance, one.index, one.attack)):
            best.setdefault(one.index, one)
        return list(best.values())

    def _clean(self, model: str) -> pd.DataFrame:
        if model not in self.models:
            raise UsageError(f"{model!r} is not a model of this run; there are {', '.join(self.models)}")
        key = (model,)
        if key not in self._memory:
            self._memory[key] = self.clean[self.clean["model"] == model].set_index("index")
        return self._memory[key]

    def _tries(self, model: str, family: str) -> pd.DataFrame:
        return self.tries[(self.tries["model"] == model) & (self.tries["family"] == family)]


def load(path: str | Path) -> Records:
    """The records in a folder that ``advkit benchmark`` or ``advkit attack`` wrote.

    Of a run that was stopped, what is finished.

    Raises:
        UsageError: There is no run in the folder, it is damaged, or of a newer version.
    """
    folder = Path(path)
    if (folder / "run.json").exists():
        return judged(of_evaluation(Evaluation.load(folder)))
    if not (folder / "benchmark.json").exists():
        raise UsageError(f"{folder} holds no run; it should be a folder that advkit benchmark or advkit attack wrote")
    return collect(Store(folder))


def with_certificates(records: Records, folders: Sequence[str | Path]) -> Records:
    """The records with what ``advkit certify`` wrote of the same models, examples and threat models.

    Raises:
        UsageError: A folder holds no certificates, or those of another model, of other data or of a threat model that was not
            measured, or of a model under noise, which is not what the run attacked.
    """
    found = tuple(_fitting(records, Path(folder)) for folder in folders)
    certain = replace(records, certificates=(*records.certificates, *found))
    return replace(certain, findings=(*records.findings, *_unsound(certain)))


def _fitting(records: Records, folder: Path) -> Certification:
    from advkit.benchmarks.certify import Certification

    one, data = Certification.load(folder), records.about["data"]
    model, family, eps = one.run["model"], *split_threat(one.run["threat"])
    if one.smoothed:
        raise UsageError(
            f"{folder} certifies {model['name']} under noise, which is another model than the one that was attacked; "
            "advkit certify --attack attacks it"
        )
    if model["digest"] not in {known["digest"] for known in records.about["models"]}:
        name, digest = model["name"], model["digest"][:8]
        known = ", ".join(f"{known['name']} ({known['digest'][:8]})" for known in records.about["models"])
        raise UsageError(f"{folder} certifies another model, {name} ({digest}); the run is of {known}")
    if data["digest"] not in (one.run["data"]["digest"], one.run["data"]["shuffled"]):
        name, digest = one.run["data"]["name"], one.run["data"]["digest"][:8]
        raise UsageError(
            f"{folder} is for other examples, {name} ({digest}); certify with the data, limit and seed of the run "
            f"(a benchmark's is 0), which is on {data['name']} ({data['digest'][:8]})"
        )
    if family not in records.families or not any(eps >= radius * (1 - 1e-9) for radius in records.steps(family)):
        measured = ", ".join(records.threat(f, radius) for f in records.families for radius in records.columns(f))
        raise UsageError(f"{folder} is for {one.run['threat']}; measured are {measured}")
    if one.threat.low > data["low"] or one.threat.high < data["high"]:
        raise UsageError(
            f"{folder} is for inputs in [{one.threat.low:g}, {one.threat.high:g}], which is less than the data's range"
        )
    return one


def _unsound(records: Records) -> Iterator[Finding]:
    """A finding where an example was certified and broken."""
    for model, family in itertools.product(records.models, records.families):
        for eps in records.steps(family):
            closest = records.closest(model, family)
            both = sorted(index for index in records.proven(model, family, eps) or () if closest[index] <= eps)
            if both:
                yield Finding(
                    "certificate",
                    "suspect",
                    model,
                    records.threat(family, eps),
                    f"{len(both)} examples are certified and were broken: {', '.join(map(str, both[:5]))}",
                    "one of the two is an error of the program: please report it with the model",
                )


def nothing(about: dict[str, Any]) -> Records:
    """The records of a benchmark before it has begun."""
    return Records(about["title"], about, _table([], CLEAN), _table([], (*TRIES, *PASSES)), _table([], COSTS))


_KINDS: dict[str, type] = {
    **dict.fromkeys(("model", "family", "attack"), object),
    **dict.fromkeys(("correct", "success"), bool),
    **dict.fromkeys(("distance", "eps", "seconds"), float),
}


def _table(parts: Sequence[tuple[Row, Columns]], columns: tuple[str, ...]) -> pd.DataFrame:
    """A table of parts, each with values that all of its rows share and its columns; its types do not depend on its rows."""
    import numpy as np
    import pandas as pd

    def column(name: str) -> np.ndarray:
        kind = _KINDS.get(name, np.int64)
        lengths = [len(next(iter(each.values()))) for _, each in parts]
        if any(name in shared for shared, _ in parts):
            values: np.ndarray = np.array([shared[name] for shared, _ in parts], kind)
            return values.repeat(lengths)
        return np.concatenate([np.empty(0, kind), *(np.asarray(each[name], kind) for _, each in parts)])

    return pd.DataFrame({name: column(name) for name in columns})


def collect(store: Store) -> Records:
    """The records of a benchmark's folder: the blocks of examples that are finished for every model that has begun.

    All models are thus judged by the same examples.
    """
    about = read_about(store.path)
    names = [model["name"] for model in about["models"]]
    found = {(name, start): _block(store, about, name, start) for name in names for start in about["blocks"]}
    begun = [name for name in names if any(found[name, start] for start in about["blocks"])]
    whole = [start for start in about["blocks"] if all(found[name, start] for name in begun)]
    done = [part for (name, start), part in found.items() if part is not None and start in whole]
    left = len(names) * len(about["blocks"]) - len(done)
    unfinished = (
        (f"{left} of {len(found)} blocks of examples are not finished for every model and do not count",) if left else ()
    )
    clean, tries, costs = ([one for part in done for one in part[i]] for i in range(3))
    return judged(
        Records(
            about["title"],
            about,
            _table(clean, CLEAN),
            _table(tries, (*TRIES, *PASSES)),
            _table(costs, COSTS),
            findings=tuple(_findings(store, about)),
            notes=(*about["notes"], *unfinished, *_stopped(about)),
            folder=store.path,
            gallery=lambda model, family: _gallery(store, about, model, family),
        )
    )


def _stopped(about: dict[str, Any]) -> tuple[str, ...]:
    """What to announce of a run that its gates ended."""
    if not about["gates"]["sequential"] or len(about["blocks"]) * about["block"] >= about["data"]["examples"]:
        return ()
    return ("the run stopped when its gates were decided; other intervals are for a number of examples fixed before",)


def _findings(store: Store, about: dict[str, Any]) -> Iterator[Finding]:
    """What the checks found; a model may have had another name when they were run."""
    for model in about["models"]:
        for finding in store.read_checks(model["checks"]) or []:
            yield replace(Finding.from_json(finding), model=model["name"])


def judged(records: Records) -> Records:
    """The records with what their own rows show of the attacks."""
    from advkit.benchmarks.rows import from_records

    return replace(records, findings=(*records.findings, *from_records(records)))


_Parts = tuple[list[tuple[Row, Columns]], list[tuple[Row, Columns]], list[tuple[Row, Columns]]]


def _block(store: Store, about: dict[str, Any], model: str, start: int) -> _Parts | None:
    """What the three tables hold of one model and block; None if a cell of it is missing."""
    parts: _Parts = ([], [], [])
    clean, tries, costs = parts
    right: set[int] = set()
    for cell in (cell for cell in about["cells"] if cell["model"] == model):
        there = store.read(cell["key"], start, cell["attack"])
        if there is None:
            return None
        head, columns = there
        if cell["attack"] is None:
            clean.append(({"model": model, "start": start}, columns))
            right = {index for index, correct in zip(columns["index"], columns["correct"], strict=True) if correct}
            continue
        if not right.issuperset(columns["index"]):
            raise store.damaged(cell["key"], start, "its rows are of other examples")
        named = {name: cell[name] for name in ("model", "family", "attack", "seed")}
        named |= {"eps": math.inf if cell["eps"] is None else cell["eps"], "start": start}
        distance = [math.inf if far is None else far for far in columns["distance"]]
        tries.append((named, {**columns, "distance": distance}))
        costs.append((named, {name: [head[name]] for name in ("examples", "seconds", "memory")}))
    return parts


def _gallery(store: Store, about: dict[str, Any], model: str, family: str) -> list[Shown]:
    labels: dict[int, int] = {}
    found = []
    for cell in (cell for cell in about["cells"] if cell["model"] == model and cell["family"] in (None, family)):
        for start in about["blocks"]:
            there = store.read(cell["key"], start, cell["attack"])
            if there is None:
                continue
            columns = there[1]
            if cell["attack"] is None:
                labels |= dict(zip(columns["index"], columns["label"], strict=True))
                continue
            kept = store.read_tensors(cell["key"], start)
            broken = {index: i for i, index in enumerate(columns["index"]) if columns["success"][i] and index in labels}
            for i, index in enumerate(kept["index"].tolist() if kept else []):
                if index not in broken:
                    raise store.damaged(cell["key"], start, "the examples that were kept are others")
                said, far = (columns[name][broken[index]] for name in ("adversarial", "distance"))
                pair = (kept["x"][i], kept["x_adv"][i])
                found.append(Shown(model, family, cell["attack"], index, labels[index], said, far, *pair))
    return found


def of_evaluation(result: Evaluation) -> Records:
    """The records of one evaluation, as a benchmark of one model and one threat model."""
    run = result.run
    family, eps = split_threat(run["threat"])
    name = run["model"]["name"]
    clean, tries = [], []
    for i, row in enumerate(result.rows):
        start = i // run["batch_size"] * run["batch_size"]
        clean.append({"model": name, "start": start, **{key: row[key] for key in ("index", "label", "clean", "correct")}})
        for part in row["attacks"]:
            says = row["adversarial"] if row["attack"] == part["attack"] else -1
            # A distance in float32 may exceed the radius by its rounding.
            distance = min(part["distance"], eps) if part["success"] else math.inf
            named = {"model": name, "family": family, "eps": eps, "seed": run["seed"], "start": start, "index": row["index"]}
            tries.append({"checks": 0, **named, **part, "distance": distance, "adversarial": says})
    common = {"model": name, "family": family, "eps": eps, "seed": run["seed"], "memory": 0}
    about = {
        "title": name,
        "data": run["data"],
        "models": [{"name": name, "spec": name, "digest": run["model"]["digest"], "training_seconds": None}],
        "families": {family: {"radii": [eps if eps < math.inf else None], "attacks": run["attacks"]}},
        "seeds": [run["seed"]],
        "alone": run["alone"],
        "access": run["access"],
        **{name: run.get(name) for name in ("budget", "votes", "fast", "compile")},
        "advkit": run["advkit"],
        "command": "",
    }
    costs = [{**common, **row} for row in result.times if row["attack"] in run["attacks"]]
    return Records(
        f"{name} on {run['data']['name']}",
        about,
        _table([({}, _columns(clean, CLEAN))], CLEAN),
        _table([({}, _columns(tries, (*TRIES, *PASSES)))], (*TRIES, *PASSES)),
        _table([({}, _columns(costs, COSTS))], COSTS),
        notes=result.notes,
        folder=result.folder,
        gallery=lambda *_: _shown(result, family),
    )


def _columns(rows: Sequence[Row], names: tuple[str, ...]) -> Columns:
    return {name: [row[name] for row in rows] for name in names}


MOST_SHOWN = 64
"""How many adversarial examples of one evaluation a gallery has."""


def _shown(result: Evaluation, family: str) -> list[Shown]:
    broken = [i for i, row in enumerate(result.rows) if row["success"] and row["distance"] > 0]
    broken = sorted(broken, key=lambda i: result.rows[i]["distance"])[:MOST_SHOWN]
    tensors, name = result.examples() if broken else {}, result.run["model"]["name"]
    rows = [(result.rows[i], tensors["x"][i], tensors["x_adv"][i]) for i in broken]
    return [
        Shown(name, family, row["attack"], row["index"], row["label"], row["adversarial"], row["distance"], x, x_adv)
        for row, x, x_adv in rows
    ]


def shown(family: str, eps: float) -> str:
    """A threat model of a family as reports name it.

    >>> shown("linf", 8 / 255), shown("l2", math.inf), shown("rotation(angle=10.0)", 1.0)
    ('linf(8/255)', 'l2', 'rotation(angle=10.0)')
    """
    return f"{family}({spec.number(eps)})" if family in BALLS and eps < math.inf else family


def split_threat(threat: str) -> tuple[str, float]:
    """The family and the radius of a threat model's spec; one that is no ball is a family of its own.

    >>> split_threat("linf(eps=0.3)"), split_threat("l2"), split_threat("rotation(angle=10.0)")
    (('linf', 0.3), ('l2', inf), ('rotation(angle=10.0)', 1.0))
    >>> split_threat("linf(eps=0.3, low=-1, high=1)"), split_threat("rotation(angle=10.0, low=-1, high=1)")
    (('linf', 0.3), ('rotation(angle=10.0)', 1.0))
    """
    try:
        built = spec.parse(threat, THREATS, "threat")
    except UsageError:
        # One that is not in the table, as Python allows, is known by its repr.
        return threat, 1.0
    # The range is that of the data.
    without = {"low": 0.0, "high": 1.0, **({"eps": math.inf} if isinstance(built, Lp) else {})}
    return spec.show(replace(built, **without), THREATS), built.eps
