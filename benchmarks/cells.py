"""What a benchmark will do, resolved: the models, the data, and a cell for each attack on each model, threat model and seed.

The cells of a model are in an order in which each has less to do for the ones before it: its clean answers, then in each family
of threat models and for each seed the searches for the closest example, then the radii, least first. An example that was
broken within a radius is broken within every greater one, so that later cells need not attack it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import advkit as package
from advkit import models as models_by_name
from advkit.benchmarks.plan import STAND_IN, Plan, parse_threat, plan, rate_of, threat_name
from advkit.benchmarks.store import FORMAT
from advkit.benchmarks.suitefile import Entry, Suite, Threat, check_name
from advkit.data import Data
from advkit.engine import Attack
from advkit.errors import UsageError
from advkit.fast import fast
from advkit.models import Model
from advkit.models.digest import digest_file, digest_files, digest_of
from advkit.threat import Change, Lp
from advkit.version import __version__


@dataclass(frozen=True)
class Cell:
    """One attack on one model; without an attack, the model's clean answers.

    Attributes:
        model: The model's name.
        family: The family of the threat model.
        eps: The radius; None where the closest example is searched for.
        attack: The attack's spec.
        seed: The seed.
        key: The hex digest of all that its rows depend on.
    """

    model: str
    family: str | None
    eps: float | None
    attack: str | None
    seed: int | None
    key: str

    @property
    def radius(self) -> float:
        """The radius, inf where there is none."""
        return math.inf if self.eps is None else self.eps


@dataclass(frozen=True)
class Prepared:
    """A suite with everything loaded and checked.

    Attributes:
        suite: The suite.
        data: Its examples, in a random order, so that the first ones are a fair sample.
        models: The models by name.
        cells: The cells of each model, in their order.
        attacks: The attacks by their spec.
        plans: The plan of each (model, family, eps).
        block: How many examples a block has.
        notes: What to announce.
        digest: The digest of the data.
        training: The seconds that each model's training took, where that is known.
    """

    suite: Suite
    data: Data
    models: Mapping[str, Model]
    cells: Mapping[str, tuple[Cell, ...]]
    attacks: Mapping[str, Attack]
    plans: Mapping[tuple[str, str, float | None], Plan]
    block: int
    notes: tuple[str, ...]
    digest: str
    training: Mapping[str, float | None]

    @property
    def starts(self) -> range:
        """The first example of each block."""
        return range(0, len(self.data), self.block)

    def about(self, starts: Sequence[int], command: str, gates: Mapping[str, Any]) -> dict[str, Any]:
        """What ``benchmark.json`` says, for the blocks that count, with what repeats the run and its gates."""
        suite, data = self.suite, self.data
        seen = sorted({plan.access for plan in self.plans.values()})
        kind = {"kind": data.kind, "low": data.low, "high": data.high, **rate_of(data)}
        return {
            "format": FORMAT,
            "title": suite.title,
            "advkit": __version__,
            "torch": torch.__version__,
            "command": command,
            "gates": dict(gates),
            "data": {"name": data.name, "digest": self.digest, "examples": len(data), "classes": list(data.classes), **kind},
            "models": [self._about(name, model) for name, model in self.models.items()],
            "families": {threat.family: self._family(threat) for threat in suite.threats},
            "seeds": list(suite.seeds),
            "alone": suite.alone,
            "access": ", ".join(access.name.lower() for access in seen),
            "budget": suite.budget,
            "votes": suite.votes,
            "fast": suite.fast,
            "compile": suite.compile,
            "block": self.block,
            "blocks": list(starts),
            "cells": [asdict(cell) for cells in self.cells.values() for cell in cells],
            "notes": list(self.notes),
        }

    def _about(self, name: str, model: Model) -> dict[str, Any]:
        described = {"name": name, "spec": model.name, "digest": model.digest, "training_seconds": self.training[name]}
        return {**described, "checks": self.checks_key(name)}

    def _family(self, threat: Threat) -> dict[str, Any]:
        # Models that answer with less are attacked by others.
        cells = [cell for cells in self.cells.values() for cell in cells if cell.family == threat.family]
        return {"radii": list(dict.fromkeys(c.eps for c in cells)), "attacks": list(dict.fromkeys(c.attack for c in cells))}

    def checks_key(self, model: str) -> str:
        """The hex digest of all that the checks of a model depend on."""
        cells, everyone = [cell.key for cell in self.cells[model]], {name: one.digest for name, one in self.models.items()}
        return _key({"checks": cells, "models": everyone, "advkit": __version__})


def prepare(
    suite: Suite,
    *,
    models: Mapping[str, Any] | None = None,
    data: Any = None,
    device: str = "cpu",
    trust_pickle: bool = False,
    probabilities: bool = False,
) -> Prepared:
    """Load what a suite names, and check all of it before anything runs.

    Arguments:
        suite: The suite.
        models: Models beside those of the suite, by name: a module, another callable, or a spec.
        data: The examples in place of the suite's: a pair (x, y), an ``advkit.data.Data`` or a spec.
        device: Where to run.
        trust_pickle: Whether pickled models may be loaded, which can run any code.
        probabilities: Whether the models return probabilities.

    Raises:
        UsageError: Something is missing, or does not fit.
    """
    if not suite.models and not models:
        raise UsageError(f"the suite {suite.title!r} names no models; give one (--model m.safetensors, or models= in Python)")
    if not suite.data and data is None:
        raise UsageError(f"the suite {suite.title!r} names no data; give some (--data mnist-5k, or data= in Python)")
    if suite.compile and not suite.fast:
        raise UsageError("compile is for the stand-in, and none is asked for; give fast as well, or leave compile out")
    examples = shuffled(_examples(suite, data))
    loaded, training = {}, {}
    for entry in _entries(suite, models or {}):
        options: dict[str, Any] = {"device": device, "trust_pickle": trust_pickle, "probabilities": probabilities}
        given = entry.model
        loaded[entry.name] = models_by_name.load(given, **options) if isinstance(given, str) else models_by_name.wrap(given)
        training[entry.name] = _training(entry)
    plans: dict[tuple[str, str, float | None], Plan] = {}
    for name, model in loaded.items():
        stand_in = fast(model.module, compile=suite.compile) if suite.fast else None
        for threat in suite.threats:
            for eps, made in _plans(suite, threat, model, examples, device).items():
                plans[name, threat.family, eps] = replace(made, fast=stand_in)
    attacks = {name: attack for made in plans.values() for name, attack in made.attacks}
    some = next(iter(plans.values()))
    block = suite.block or some.batch_size
    digest = some.data_digest
    cells = {name: tuple(_cells(suite, name, model, plans, digest, block)) for name, model in loaded.items()}
    return Prepared(suite, examples, loaded, cells, attacks, plans, block, _notes(suite, loaded, plans), digest, training)


def _entries(suite: Suite, models: Mapping[str, Any]) -> list[Entry]:
    """The models of the suite and those beside them."""
    for name in models:
        check_name(name)
        if name in [entry.name for entry in suite.models]:
            raise UsageError(f"the suite has a model {name} already; give the other one another name")
    return [*suite.models, *(Entry(name, model) for name, model in models.items())]


def _examples(suite: Suite, data: Any) -> Data:
    from advkit.benchmarks.evaluate import examples_of

    examples = examples_of(suite.data if data is None else data, suite.split, suite.limit, 0)
    if len(examples.index.unique()) < len(examples):
        raise UsageError(f"two examples of {examples.name} have the same number; each should have one of its own")
    return examples


def shuffled(data: Data) -> Data:
    """The examples in the order in which a benchmark takes them: random, and always the same."""
    return data.select(torch.randperm(len(data), generator=torch.Generator().manual_seed(0)))


def _training(entry: Entry) -> float | None:
    """What a model's training took: as the suite says, or as advkit's own checkpoint does."""
    from advkit.models import checkpoint

    if entry.training_seconds is not None:
        return entry.training_seconds
    if not isinstance(entry.model, str) or not entry.model.endswith(".safetensors"):
        return None
    said = checkpoint.read(entry.model)[1].get("seconds", "nan")
    try:
        seconds = float(said)
    except ValueError:  # what another program means by it
        return None
    return seconds if 0 <= seconds < math.inf else None


def _plans(suite: Suite, threat: Threat, model: Model, data: Data, device: str) -> dict[float | None, Plan]:
    """The plan of each radius of a family, in the order they are attacked in; that of None is for the closest example."""
    given = parse_threat(threat.family, data)
    within = {eps: replace(given, eps=eps) if isinstance(given, Lp) else given for eps in sorted(threat.radii)}
    found: dict[float | None, Plan] = {}
    if threat.closest:
        found[None] = _plan(suite, given, threat.closest, model, data, device)
    if within:
        first = _plan(suite, next(iter(within.values())), threat.attacks, model, data, device)
        found |= {eps: replace(first, threat=one) for eps, one in within.items()}
    return found


def _plan(suite: Suite, threat: Lp | Change, names: tuple[str, ...], model: Model, data: Data, device: str) -> Plan:
    return plan(
        model,
        data,
        threat=threat,
        # A suite of attacks that is alone keeps its own order.
        attacks=names[0] if len(names) == 1 else names,
        access=suite.access,
        budget=suite.budget,
        device=device,
        quantize=False,
        votes=suite.votes,
    )


def _cells(
    suite: Suite,
    name: str,
    model: Model,
    plans: Mapping[tuple[str, str, float | None], Plan],
    digest: str,
    block: int,
) -> list[Cell]:
    device = next(iter(plans.values())).device.type
    common = {"code": _code(), "model": model.digest, "data": digest, "block": block, "votes": suite.votes, "device": device}
    cells = [Cell(name, None, None, None, None, _key(common))]
    common |= {"budget": suite.budget, "fast": suite.fast, "compile": suite.compile, "keep": suite.keep}
    for threat in suite.threats:
        for seed in suite.seeds:
            before = ""
            for eps, made in _of(plans, name, threat.family).items():
                for attack, built in made.attacks:
                    what = {"threat": threat_name(made.threat), "access": made.access.name, "seed": seed}
                    files = digest_files([made.threat, built])
                    what |= {"files": files} if files else {}
                    # Which examples an attack meets inside a radius depends on all attacks before it.
                    met = before if eps is not None and not suite.alone else ""
                    key = _key({**common, **what, "before": met, "attack": attack, "version": digest_of(built)})
                    before = _key({"before": before, "then": key})
                    cells.append(Cell(name, threat.family, eps, attack, seed, key))
    return cells


def _of(plans: Mapping[tuple[str, str, float | None], Plan], name: str, family: str) -> dict[float | None, Plan]:
    """The plans of one model and family, by their radii, in their order."""
    return {eps: made for (model, of, eps), made in plans.items() if (model, of) == (name, family)}


@functools.cache
def _code() -> str:
    """The hex digest of the code that attacks share; the file of each is in its own."""
    files = sorted(Path(package.__file__).parent.glob("*.py"))
    return _key({file.name: digest_file(file) for file in files})


def _key(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _notes(suite: Suite, models: Mapping[str, Model], plans: Mapping[tuple[str, str, float | None], Plan]) -> tuple[str, ...]:
    said: dict[str, list[str]] = {}
    for (name, _, _), made in plans.items():
        for note in made.notes:
            if name not in said.setdefault(note, []):
                said[note].append(name)
    notes = [note if len(names) == len(models) else f"{', '.join(names)}: {note}" for note, names in said.items()]
    return (*notes, *([STAND_IN] if suite.fast else []))
