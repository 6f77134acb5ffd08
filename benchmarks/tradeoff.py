"""What robustness costs in clean accuracy: a family of networks, trained and measured over the same seeds.

A member of the family is a training loss and a threat model that it should withstand. Each is trained once a seed; with the
same seed all begin with the same weights and see the examples in the same order, so that members can be compared seed by seed.
A row is written for each network that is done, and every number comes from the rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from advkit import spec
from advkit.benchmarks.evaluate import evaluate
from advkit.benchmarks.folder import Row, append, claimed, damaged, replace, resumable
from advkit.benchmarks.plan import parse_threat, plan, threat_name
from advkit.benchmarks.statistics import Estimate, student
from advkit.data import Data
from advkit.data.dataset import check_seed
from advkit.defenses import check_radius, fresh, named, threats_of
from advkit.errors import UsageError
from advkit.models import checkpoint, networks, wrap
from advkit.threat import THREATS
from advkit.train import RECIPES, Diverged, Recipe, accuracy, place, train

if TYPE_CHECKING:
    import pandas as pd

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Member:
    """One kind of training.

    Attributes:
        defense: The training loss, as typed.
        threat: What it should withstand, as typed; None for a loss that knows no adversary.
    """

    defense: str
    threat: str | None

    def __str__(self) -> str:
        return self.defense if self.threat is None else f"{self.defense} {self.threat}"


@dataclass(frozen=True)
class Tradeoff:
    """A family that was measured.

    Attributes:
        run: What was run: network, data, recipe, attack.
        members: The members, in the order in which they were given; the others are compared with the first.
        at: The threat models under which robust accuracy was measured, by name.
        rows: A row for each member and seed: counts of examples, and the seconds of training.
    """

    run: dict[str, Any]
    members: tuple[str, ...]
    at: tuple[str, ...]
    rows: tuple[Row, ...]

    def accuracy(self, member: str, at: str | None = None) -> Estimate:
        """The mean accuracy of a member over its seeds, clean or under a threat model, with Student's interval."""
        return student([_share(row, at) for row in self.rows if row["member"] == member])

    def difference(self, member: str, at: str | None = None) -> Estimate:
        """By how much a member's accuracy exceeds the first's: the mean over the seeds that both have, with its interval."""
        base = {row["seed"]: _share(row, at) for row in self.rows if row["member"] == self.members[0]}
        own = {row["seed"]: _share(row, at) for row in self.rows if row["member"] == member}
        return student([own[seed] - base[seed] for seed in own if seed in base])

    def table(self) -> pd.DataFrame:
        """A row for each network, in the order in which they were trained."""
        import pandas as pd

        return pd.DataFrame(
            {
                "member": row["member"],
                "seed": row["seed"],
                "clean": _share(row, None),
                **{at: _share(row, at) for at in self.at},
                "seconds": row["seconds"],
            }
            for row in self.rows
        )

    def summary(self) -> dict[str, Any]:
        """What each member is worth: its accuracies, and by how much they exceed the first member's."""
        measures = {"clean": None, **{at: at for at in self.at}}
        members = []
        for member in self.members:
            own = [row["seconds"] for row in self.rows if row["member"] == member and row["seconds"] is not None]
            worth = {name: asdict(self.accuracy(member, at)) for name, at in measures.items()}
            above = {name: asdict(self.difference(member, at)) for name, at in measures.items()}
            seconds = sum(own) / len(own) if own else None
            members.append({"member": member, "accuracy": worth, "above_first": above, "seconds": seconds})
        return {"run": self.run, "members": members}


def _share(row: Row, at: str | None) -> float:
    count, of = row["clean"] if at is None else row["robust"][at]
    return count / of


def tradeoff(
    network: str,
    data: Data,
    test: Data,
    *,
    defenses: Sequence[str],
    threats: Sequence[str] = (),
    at: Sequence[str] | None = None,
    attack: str = "standard",
    limit: int | None = 1000,
    recipe: Recipe | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
    out: str | Path,
    report: Report | None = None,
) -> Tradeoff:
    """Train a family of networks and measure each, clean and under attack.

    Arguments:
        network: A network: ``mnist-cnn``; advkit list models.
        data: What to learn.
        test: What accuracy is measured on.
        defenses: Training losses: ``plain``, ``trades(beta=6)``. One that takes a threat model is trained once for each, or for
            the one that it names: ``pgd(steps=7) linf(0.3)``.
        threats: What they should withstand: ``linf(0.1)``.
        at: Under what robust accuracy is measured; by default, ``threats``.
        attack: With what: an attack or a suite.
        limit: On how many examples of ``test``, classes in proportion; clean accuracy is measured on all.
        recipe: How all are trained; by default as the network's own recipe says.
        seeds: Of the weights and the order of the examples; each member is trained with each.
        device: Where to run.
        out: A folder for the rows, the checkpoints and the summary; what is done is not done again.
        report: Called with the share that is done and a text.

    Raises:
        UsageError: Something given is not of this form, or the folder holds another family.
    """
    for seed in seeds:
        check_seed(seed)
    if not defenses or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(
            f"there are {len(defenses)} defenses and the seeds {list(seeds)}; give at least one of each, seeds once"
        )
    architecture = spec.show(spec.parse(network, networks.NETWORKS, "network"), networks.NETWORKS)
    recipe = RECIPES[architecture.split("(")[0]].for_examples(len(data)) if recipe is None else recipe
    members = family(defenses, threats, data)
    place(device)
    measured = tuple(dict.fromkeys(threat_name(parse_threat(threat, test)) for threat in at or threats))
    if not measured:
        raise UsageError("there is no threat model to measure robust accuracy under; give one, as in linf(0.1)")
    if limit is not None:
        spec.check_whole("the limit", limit, 1)
    # What cannot be attacked should be known before anything is trained, and before the folder is of this family.
    for threat in measured:
        plan(wrap(networks.build(architecture)), test, threat=threat, attacks=attack)
    about = {
        "network": architecture,
        "data": {"name": data.name, "digest": data.digest()},
        "test": {"name": test.name, "digest": test.digest()},
        "recipe": asdict(recipe),
        "at": list(measured),
        "attack": attack,
        "limit": limit,
    }
    path = Path(out)
    keep = lambda rows, file: _kept(rows, file, measured)
    with resumable(), claimed(path, about, {"member", "seed", "clean", "robust", "seconds"}, keep) as rows:
        trainer = _Trainer(path, architecture, recipe, data, test, measured, attack, limit, device)
        todo = [(member, seed) for seed in seeds for member in members]
        done = {(row["member"], row["seed"]) for row in rows}
        for i, (member, seed) in enumerate(todo):
            if (str(member), seed) in done:
                continue
            row = trainer.row(member, seed, _part(report, i, len(todo)))
            append(path / "rows.jsonl", [row])
            rows.append(row)
        wanted = {(str(member), seed) for member, seed in todo}
        mine = tuple(row for row in rows if (row["member"], row["seed"]) in wanted)
        result = Tradeoff(about, tuple(map(str, members)), measured, mine)
        replace(path / "summary.json", json.dumps(result.summary(), indent=2) + "\n")
    return result


def _part(report: Report | None, i: int, n: int) -> Report:
    """The progress of the i-th of n parts."""
    return lambda share, text: report((i + share) / n, text) if report else None


def family(defenses: Sequence[str], threats: Sequence[str], data: Data) -> tuple[Member, ...]:
    """Every training loss with every threat model; one that knows no adversary by itself, once; one with its own, with that.

    Raises:
        UsageError: An unknown name, a loss that needs a threat model where there is none, or one that has no use for its own.
    """
    members = []
    for text in defenses:
        defense, own = _split(text)
        loss = named(defense, parse_threat(own or threats[0], data)) if own or threats else named(defense)
        if own and not threats_of(loss):
            raise UsageError(f"{text} names a threat model and {defense} knows no adversary; give it without one")
        wanted = [own] if own else threats if threats_of(loss) else [None]
        for threat in wanted:
            named(defense, None if threat is None else parse_threat(threat, data))
            members.append(Member(defense, threat))
    return tuple(dict.fromkeys(members))


def _split(text: str) -> tuple[str, str | None]:
    """A training loss and its own threat model, if it names one: ``pgd(steps=7) linf(0.3)``."""
    found = re.fullmatch(r"(.*\S)\s+([\w-]+\([^()]*\))\s*", text)
    if found and found[2].split("(")[0] in THREATS:
        return found[1], found[2]
    return text.strip(), None


def _kept(rows: list[Row], path: Path, at: Sequence[str]) -> list[Row]:
    """The rows, where each is one that there can be."""
    if not all(_well_formed(row, at) for row in rows):
        raise damaged(path, "a row is of other threat models, or holds no counts")
    if len({(row["member"], row["seed"]) for row in rows}) < len(rows):
        raise damaged(path, "a network has two rows")
    return rows


def _well_formed(row: Row, at: Sequence[str]) -> bool:
    """Whether a row is as :meth:`_Trainer.row` makes it."""
    robust, seconds = row["robust"], row["seconds"]
    if not isinstance(robust, dict) or set(robust) != set(at):
        return False
    timed = seconds is None or (type(seconds) in (int, float) and math.isfinite(seconds))
    named = type(row["member"]) is str and type(row["seed"]) is int
    return timed and named and all(map(_counts, [row["clean"], *robust.values()]))


def _counts(pair: object) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(n) is int for n in pair):
        return False
    return bool(0 <= pair[0] <= pair[1] != 0)


@dataclass(frozen=True)
class _Trainer:
    """Trains and measures one network at a time."""

    path: Path
    architecture: str
    recipe: Recipe
    data: Data
    test: Data
    at: tuple[str, ...]
    attack: str
    limit: int | None
    device: str

    def row(self, member: Member, seed: int, tell: Report) -> Row:
        """The row of one network: how many examples it gets right, clean and under each threat model."""
        model, seconds = self._trained(member, seed, tell)
        robust = {}
        for i, at in enumerate(self.at):
            tell(0.8 + 0.2 * i / len(self.at), f"{member}, seed {seed}: {self.attack} at {at}")
            result = evaluate(model, self.test, threat=at, attacks=self.attack, limit=self.limit, device=self.device)
            robust[at] = [result.robust_accuracy.count, result.robust_accuracy.of]
        return {
            "member": str(member),
            "seed": seed,
            "clean": list(accuracy(model, self.test)),
            "robust": robust,
            "seconds": seconds,
        }

    def _trained(self, member: Member, seed: int, tell: Report) -> tuple[nn.Module, float | None]:
        """The network, and how long it took; None where it was trained in parts."""
        name = hashlib.sha256(f"{member} {seed}".encode()).hexdigest()[:16]
        file = self.path / "models" / f"{name}.safetensors"
        if file.exists():
            return self._loaded(file)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        whole, began = not partial.exists(), time.perf_counter()
        loss = named(member.defense, None if member.threat is None else parse_threat(member.threat, self.data))
        for one in threats_of(loss):
            check_radius(one, self.data)
        who = f"{member}, seed {seed}"
        try:
            # Not watched and not stopped early, so that all take the same steps on the same examples.
            model = train(
                fresh(self.architecture, loss, seed),
                self.data,
                self.recipe,
                loss=loss,
                seed=seed,
                device=self.device,
                partial=partial,
                identity=f"{self.architecture} {member}",
                report=lambda at: tell(0.8 * at.step / at.steps, f"{who}: epoch {at.epoch + 1} of {at.epochs}"),
            )
        except Diverged as error:
            raise Diverged(f"{who}: {error}") from None
        seconds = time.perf_counter() - began if whole else None
        about = {} if seconds is None else {"seconds": f"{seconds:.1f}"}
        checkpoint.save(file, model, self.architecture, member=str(member), seed=str(seed), **about)
        partial.unlink(missing_ok=True)
        return model, seconds

    def _loaded(self, file: Path) -> tuple[nn.Module, float | None]:
        model, about = checkpoint.load(file)
        if about["architecture"] != self.architecture:
            raise damaged(file, f"it is a {about['architecture']}")
        try:
            return model.to(self.device), float(about["seconds"]) if "seconds" in about else None
        except ValueError:
            raise damaged(file, f"its seconds are {about['seconds']}") from None


def draw(result: Tradeoff, path: Path) -> None:
    """Draw clean against robust accuracy, a panel for each threat model, as PNG or SVG by the file's ending.

    A cross is a member's mean with its interval over the seeds, small dots are its networks, and the dashed line is the clean
    accuracy of the first member.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.2 * len(result.at), 4.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(result.at), squeeze=False)[0]
    for axes, at in zip(panels, result.at, strict=True):
        base = 100 * result.accuracy(result.members[0]).value
        axes.axvline(base, color="#888888", linestyle="--", linewidth=1)
        for i, member in enumerate(result.members):
            rows = [row for row in result.rows if row["member"] == member]
            colour = f"C{i % 10}"
            x, y = ([100 * _share(row, which) for row in rows] for which in (None, at))
            axes.plot(x, y, ".", color=colour, alpha=0.4, markersize=5)
            clean, robust = result.accuracy(member), result.accuracy(member, at)
            across, up = (100 * (value.high - value.value) if len(rows) > 1 else None for value in (clean, robust))
            mark = "osD^vPX*"[i // 10 % 8]
            axes.errorbar(
                100 * clean.value, 100 * robust.value, xerr=across, yerr=up, fmt=mark, color=colour, label=member, capsize=2
            )
        axes.set(xlabel="clean accuracy (%)", ylabel=f"robust accuracy (%), {at}")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    figure.savefig(path)
