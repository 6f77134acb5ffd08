"""How far an adversary can push a model: the evaluation behind ``advkit attack`` and ``advkit.evaluate``.

Every example is attacked by each attack in turn, cheap ones first. Inside a fixed radius an example that one attack broke is
not given to the next; in a search for the closest example the closest of all attacks counts.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.folder import Batch, Folder, Row
from advkit.benchmarks.result import Evaluation
from advkit.data import Data
from advkit.data.dataset import check_seed
from advkit.engine import Attack, AttackResult, check_serves, frozen, run
from advkit.errors import AccessError, UsageError
from advkit.models import Model
from advkit.oracle import Access, Goal, answer
from advkit.streams import Streams
from advkit.threat import THREATS, Lp
from advkit.version import __version__

ENTRIES_A_BATCH = 200_704
"""How many numbers a batch holds by default: 256 digits of 28 x 28."""

FIXED = {
    Access.GRADIENTS: ("fgsm", "pgd(steps=40)", 'restarts(pgd(steps=40, loss="margin"), n=5)', "square(queries=500)"),
    Access.SCORES: ("uniform", "square"),
    Access.LABELS: ("uniform", "gaussian", "salt-and-pepper"),
}
"""The attacks inside a fixed radius where none is named, by what the adversary sees."""

GRID = "rounding to the grid"
"""What the time of testing and attacking again on the data's grid goes by."""

CLOSEST = ("fmn", "fmn(steps=200, alpha=3)")
"""The attacks in a search for the closest example where none is named."""


@dataclass(frozen=True)
class Status:
    """Where an evaluation stands.

    Attributes:
        start: Examples that were done before this run went on.
        done: Examples done; those of the batch at hand count by the share of attacks that are done with it.
        total: Examples in all.
        seen: Examples that at least one attack was run on.
        robust: Of those seen, how many the model got right and no attack broke so far.
        attack: What was running.
    """

    start: int
    done: float
    total: int
    seen: int
    robust: int
    attack: str


@dataclass(frozen=True)
class Plan:
    """One evaluation, fully said: nothing is left to choose."""

    model: Model
    data: Data
    attacks: tuple[tuple[str, Attack], ...]
    threat: Lp
    target: str | None
    access: Access
    budget: int | None
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    seed: int
    quantize: bool
    alone: bool
    notes: tuple[str, ...]
    data_digest: str

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same."""
        kind = {"kind": self.data.kind, "low": self.data.low, "high": self.data.high}
        return {
            "format": 1,
            "advkit": __version__,
            "model": {"name": self.model.name, "digest": self.model.digest},
            "data": {"name": self.data.name, "digest": self.data_digest, "examples": len(self.data), **kind},
            "attacks": [name for name, _ in self.attacks],
            "threat": spec.show(self.threat, THREATS),
            "goal": self.target or "untargeted",
            "access": self.access.name.lower(),
            "budget": self.budget,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "quantize": self.quantize,
            "alone": self.alone,
        }


def evaluate(
    model: Any,
    data: Any,
    *,
    threat: str | Lp,
    attacks: str | Attack | Sequence[str | Attack] | None = None,
    goal: str | int = "untargeted",
    access: str | Access | None = None,
    budget: int | None = None,
    limit: int | None = None,
    split: str = "test",
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    quantize: bool | None = None,
    alone: bool = False,
    out: str | Path | None = None,
    report: Callable[[Status], None] | None = None,
) -> Evaluation:
    """Attack a model on data and say how robust it is, example by example.

    Arguments:
        model: A module, any callable from inputs (N, *) to logits (N, K), what ``advkit.models.load`` returns, or its spec.
        data: A pair (x, y) of tensors or arrays, an ``advkit.data.Data``, or its spec (``mnist-5k``).
        threat: What the adversary may change: ``linf(8/255)``, or ``linf`` to search for the closest example; the range of
            the data is the data's own unless the spec gives low and high.
        attacks: One or more attacks or specs; by default, several that serve the threat model and the access.
        goal: ``untargeted``, a class (examples of that class are left out), ``next``, ``random`` (another class) or
            ``least-likely`` (by the model's logits for the clean input).
        access: ``gradients``, ``scores`` or ``labels``; by default, all that the model can answer.
        budget: The most forward passes of each attack for an example.
        limit: At most how many examples, with the classes in proportion; by default, all.
        split: Which part of a data set that is named.
        batch_size: Examples at a time; the result does not depend on it, but for the rounding of floats.
        device: Where to run.
        seed: What every random draw comes from; each example has its own streams.
        quantize: Whether to round successes to the data's own grid inside the ball and test them again; by default, where
            the data came as 8-bit integers.
        alone: Whether every attack is run on every example, not only on those that are left.
        out: A folder to keep rows and examples in, batch by batch; the same call goes on where it stopped.
        report: Called after each attack on a batch.

    Raises:
        UsageError: Something given is not of this form; the message says what was given and what is allowed.

    >>> digits = lambda x: x.flatten(1)[:, :10]
    >>> x = torch.full((4, 1, 5, 5), 0.2)
    >>> x[:, 0, 0, 3] = 0.8
    >>> result = evaluate(digits, (x, torch.full((4,), 3)), threat="linf(0.4)", attacks="pgd(steps=5)", quantize=False)
    >>> result.clean_accuracy.value, result.robust_accuracy.value
    (1.0, 0.0)
    """
    loaded = models_by_name.load(model, device=device) if isinstance(model, str) else models_by_name.wrap(model)
    examples = _examples(data, split, limit, seed)
    planned = plan(
        loaded,
        examples,
        threat=threat,
        attacks=attacks,
        goal=goal,
        access=access,
        budget=budget,
        batch_size=batch_size,
        device=device,
        seed=seed,
        quantize=quantize,
        alone=alone,
    )
    return execute(planned, Path(out) if out is not None else None, report)


def execute(plan: Plan, out: Path | None, report: Callable[[Status], None] | None) -> Evaluation:
    """Run what a plan says, in memory or in a folder."""
    identity = plan.identity()
    if out is not None:
        try:
            return _execute_in(plan, out, identity, report)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            sentence = f"{error.strerror or error}{where}; what was finished before is kept, and the same command goes on"
            raise UsageError(sentence) from error
    batches = list(_batches(plan, 0, [], report))
    rows = [row for batch in batches for row in batch.rows]
    names = batches[0].tensors
    tensors = {name: torch.cat([batch.tensors[name] for batch in batches]) for name in names}
    times = [row for batch in batches for row in batch.times]
    return Evaluation(identity, rows, times, (*plan.notes, *_failed(plan, rows)), tensors=tensors)


def _execute_in(plan: Plan, out: Path, identity: dict[str, Any], report: Callable[[Status], None] | None) -> Evaluation:
    with Folder(out, identity, plan.data.index.tolist(), plan.batch_size) as folder:
        for batch in _batches(plan, len(folder.rows), folder.rows, report):
            folder.append(batch)
        notes = (*plan.notes, *_failed(plan, folder.rows))
        result = Evaluation(identity, folder.rows, folder.times, notes, folder=out)
        folder.finish(result.summary())
        return result


def _failed(plan: Plan, rows: list[Row]) -> tuple[str, ...]:
    """What to announce where a search without a radius found nothing: a failure of the attack, not a strength of the model."""
    unbroken = sum(row["correct"] and not row["success"] for row in rows)
    if plan.threat.eps < math.inf or plan.target is not None or not unbroken:
        return ()
    return (f"the search found nothing at any distance for {unbroken} examples, so it failed there; try more steps",)


def _examples(data: Any, split: str, limit: int | None, seed: int) -> Data:
    if limit is not None:
        spec.check_whole("the limit", limit, 1)
    if isinstance(data, str):
        return data_by_name.load(data, split=split, limit=limit, seed=seed)
    if isinstance(data, Data):
        return data.limited(limit, seed)
    if isinstance(data, tuple | list) and len(data) == 2:
        return data_by_name.from_tensors(*data).limited(limit, seed)
    raise UsageError(f"the data is {type(data).__name__}; it should be a pair (x, y), an advkit.data.Data or a spec")


def plan(
    model: Model,
    data: Data,
    *,
    threat: str | Lp,
    attacks: str | Attack | Sequence[str | Attack] | None = None,
    goal: str | int = "untargeted",
    access: str | Access | None = None,
    budget: int | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    quantize: bool | None = None,
    alone: bool = False,
) -> Plan:
    """Everything that :func:`evaluate` would do, checked before the first attack; the arguments are evaluate's.

    Raises:
        UsageError: As evaluate.
    """
    place = models_by_name.find_device(device)
    check_seed(seed)
    if not len(data):
        raise UsageError(f"{data.name} holds no examples; there should be at least one")
    threat = parse_threat(threat, data)
    seen = _access(access, model)
    chosen = _attacks(attacks, threat, seen)
    target, data, notes = _target(goal, data)
    x, _ = data.batch(0, 8)
    dtype = _dtype(model)
    if all(attack.paper == "baseline" for _, attack in chosen):
        notes = (*notes, "only noise is tried, which is no adversary: the robust accuracy says little")
    notes = (
        *model.notes,
        *data.notes,
        *notes,
        *models_by_name.inspect(model, x.to(place, dtype), data.y.to(place), len(data.classes)),
    )
    on_grid = data.levels is not None and (threat.low, threat.high) == (data.low, data.high)
    if quantize and not on_grid:
        raise UsageError(
            "there is no grid to round to: the data are not 8-bit integers in the threat's range; leave quantize out"
        )
    if batch_size is None:
        batch_size = max(16, min(256, ENTRIES_A_BATCH // x[0].numel()))
    spec.check_whole("batch size", batch_size, 1)
    if budget is not None:
        spec.check_whole("budget", budget, 1)
    rounded = on_grid if quantize is None else quantize
    return Plan(
        model, data, chosen, threat, target, seen, budget, batch_size, place, dtype, seed, rounded, alone, notes, data.digest()
    )


def _dtype(model: Model) -> torch.dtype:
    """float64 for a module in float64, else float32."""
    first = next(model.module.parameters(), None) if isinstance(model.module, nn.Module) else None
    return torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32


def parse_threat(threat: str | Lp, data: Data) -> Lp:
    """The threat model of a spec, over the data's own range unless the spec gives one."""
    if isinstance(threat, Lp):
        return threat
    if not isinstance(threat, str):
        raise UsageError(f"the threat model is {threat!r}; it should be an Lp or a spec, as in linf(0.3)")
    return spec.parse(threat, THREATS, "threat", defaults={"low": data.low, "high": data.high})


def _access(access: str | Access | None, model: Model) -> Access:
    if access is None:
        return model.access
    if not isinstance(access, Access):
        levels = {level.name.lower(): level for level in Access}
        spec.check_choice("access", access, levels)
        access = levels[access]
    if access > model.access:
        name, most = access.name.lower(), model.access.name.lower()
        raise AccessError(f"{model.name} answers with {most} only; the access asked for is {name}")
    return access


def _attacks(
    attacks: str | Attack | Sequence[str | Attack] | None, threat: Lp, access: Access
) -> tuple[tuple[str, Attack], ...]:
    """The attacks by name, cheap ones first; refused up front where they do not serve the threat model or the access."""
    if attacks is None:
        built = _default_attacks(threat, access)
    else:
        listed = [attacks] if isinstance(attacks, str) or not isinstance(attacks, Sequence) else list(attacks)
        built = [spec.parse(attack, ATTACKS, "attack") if isinstance(attack, str) else attack for attack in listed]
    if not built:
        raise UsageError("there is no attack to run; name at least one")
    for attack in built:
        check_serves(attack, threat)
        if attack.access > access:
            needs, sees = attack.access.name.lower(), access.name.lower()
            able = ", ".join(name for name, make in ATTACKS.items() if _leaf_access(make) <= access)
            raise AccessError(
                f"{attack_name(attack)} needs {needs}; the adversary sees {sees}; attacks that do with that: {able}"
            )
    named = [(attack_name(attack), attack) for attack in built]
    if len({name for name, _ in named}) < len(named):
        raise UsageError("the same attack is named twice; each attack is run once")
    return tuple(sorted(named, key=lambda pair: pair[1].cost))


def _leaf_access(make: Any) -> int:
    """What a table's attack needs; a wrapper's depends on what it wraps, so it is not offered."""
    access = getattr(make, "access", None)
    return access if isinstance(access, Access) else len(Access)


def _default_attacks(threat: Lp, access: Access) -> list[Attack]:
    names = FIXED[access] if threat.eps < math.inf else CLOSEST
    attacks: list[Attack] = [spec.parse(name, ATTACKS, "attack") for name in names]
    able = [attack for attack in attacks if threat.p in attack.norms and attack.access <= access]
    if not able:
        name, sees = spec.show(threat, THREATS), access.name.lower()
        raise UsageError(f"no default attack serves {name} with access to {sees}; name attacks, or give a radius")
    return able


def attack_name(attack: Attack) -> str:
    """The spec of an attack, or its repr where it is not in the table.

    Raises:
        UsageError: The attack is not a dataclass, whose repr says all of its settings and nothing else.
    """
    if not is_dataclass(attack):
        raise UsageError(f"the attack {type(attack).__name__} is not a dataclass; write @dataclass(frozen=True) above it")
    try:
        return spec.show(attack, ATTACKS)
    except UsageError:
        return repr(attack)


TARGETS = ("next", "random", "least-likely")


def _target(goal: str | int, data: Data) -> tuple[str | None, Data, tuple[str, ...]]:
    """What targets are made from (None: no target), the examples that can have one, and what to announce."""
    goal = str(goal)
    if goal == "untargeted":
        return None, data, ()
    if goal in TARGETS:
        return goal, data, ()
    if not re.fullmatch("[0-9]{1,9}", goal):
        raise UsageError(f"the goal is {goal!r}; it should be untargeted, a class number, {', '.join(TARGETS)}")
    other = (data.y != int(goal)).nonzero().squeeze(1)
    if not len(other):
        raise UsageError(f"every example is of class {goal}, so none can be pushed to it; give another target or other data")
    left = len(data) - len(other)
    note = (f"{left} examples of class {goal} are left out: they are the target already",) if left else ()
    return goal, data.select(other), note


def _targets(plan: Plan, y: Tensor, clean: Tensor, index: Tensor) -> Tensor:
    """The target of each row, (N,), never its label."""
    k = clean.shape[1]
    if plan.target == "next":
        return (y + 1) % k
    if plan.target == "random":
        return (y + 1 + Streams.seeded(plan.seed, index.tolist(), "target", y.device).integers(k - 1)) % k
    if plan.target == "least-likely":
        return clean.scatter(1, y.unsqueeze(1), math.inf).argmin(1)
    target = int(plan.target or 0)
    if target >= k:
        raise UsageError(f"the target is class {target}; the model has classes 0 to {k - 1}")
    return torch.full_like(y, target)


def _batches(plan: Plan, start: int, rows: list[Row], report: Callable[[Status], None] | None) -> Iterator[Batch]:
    """The batches from the example at ``start``; ``rows`` are the records before it."""
    total, robust = len(plan.data), sum(row["correct"] and not row["success"] for row in rows)
    for first in range(start, total, plan.batch_size):
        last = min(first + plan.batch_size, total)

        def tell(left: int, k: int, first: int = first, last: int = last, before: int = robust) -> None:
            if report:
                done = first + (last - first) * (k + 1) / len(plan.attacks)
                report(Status(start, done, total, last, before + left, plan.attacks[k][0]))

        with frozen(plan.model.module):
            batch = _attack_batch(plan, first, last, tell)
        robust += sum(row["correct"] and not row["success"] for row in batch.rows)
        yield batch


def _attack_batch(plan: Plan, first: int, last: int, tell: Callable[[int, int], None]) -> Batch:
    x, y = plan.data.batch(first, last)
    x, y = x.to(plan.device, plan.dtype), y.to(plan.device)
    index = plan.data.index[first:last]
    model = plan.model.module
    with torch.no_grad():
        clean = answer(model, x)
    correct = clean.argmax(1) == y
    goal = Goal(targeted=plan.target is not None)
    wanted = _targets(plan, y, clean, index) if goal.targeted else y
    worst = _Worst(x, clean, index)
    times: list[Row] = []
    for k, (name, attack) in enumerate(plan.attacks):
        left = correct & ~worst.success if plan.threat.eps < math.inf and not plan.alone else correct
        rows = left.nonzero().squeeze(1)
        began = time.perf_counter()
        if len(rows):
            rng = Streams.seeded(plan.seed, index[rows.cpu()].tolist(), name, plan.device)
            found = run(
                attack,
                model,
                x[rows],
                wanted[rows],
                plan.threat,
                goal=goal,
                access=plan.access,
                budget=plan.budget,
                rng=rng,
            )
            worst.add(name, rows, found)
        times.append({"start": first, "attack": name, "examples": len(rows), "seconds": time.perf_counter() - began})
        tell(int((correct & ~worst.success).sum()), k)
    began = time.perf_counter()
    grid = _Grid(plan, x, wanted, worst, goal) if plan.quantize else None
    if grid is not None:
        again = int((worst.grid_forwards > 0).sum())
        times.append({"start": first, "attack": GRID, "examples": again, "seconds": time.perf_counter() - began})
    return Batch(_rows(plan, index, y, wanted, clean, correct, worst, grid), times, _tensors(plan, x, worst, grid))


class _Worst:
    """The closest success of each row over several attacks, and what each attack did."""

    def __init__(self, x: Tensor, clean: Tensor, index: Tensor) -> None:
        self.index = index
        self.x_adv, self.outputs = x.clone(), clean.clone()
        self.success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.distance = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        self.attack: list[str | None] = [None] * len(x)
        self.each: list[list[Row]] = [[] for _ in range(len(x))]
        # The clean pass that decides which rows are attacked.
        self.checks = torch.ones(len(x), dtype=torch.int64, device=x.device)
        self.grid_forwards, self.grid_backwards = torch.zeros_like(self.checks), torch.zeros_like(self.checks)

    def add(self, name: str, rows: Tensor, result: AttackResult) -> None:
        """Note what an attack did to ``rows``."""
        closer = result.success & (result.distance < self.distance[rows])
        who = rows[closer]
        self.x_adv[who], self.outputs[who] = result.x_adv[closer], result.outputs[closer]
        self.distance[who], self.success[who] = result.distance[closer], True
        self.checks[rows] += result.checks
        for i in who.tolist():
            self.attack[i] = name
        columns = (result.success, result.distance, result.forwards, result.backwards)
        for i, success, distance, forwards, backwards in zip(rows.tolist(), *(c.tolist() for c in columns), strict=True):
            passes = {"forwards": forwards, "backwards": backwards}
            self.each[i].append({"attack": name, "success": success, "distance": distance if success else None, **passes})


class _OnGrid(nn.Module):
    """The model behind a rounding of its input to the grid, through which gradients pass as if it were not there."""

    def __init__(self, model: Callable[[Tensor], Any], threat: Lp, levels: int) -> None:
        super().__init__()
        self.model, self.threat, self.levels = model, threat, levels

    def forward(self, x: Tensor) -> Any:
        """What the model says of the rounded input."""
        threat = self.threat
        with torch.no_grad():
            rounded = threat.low + ((x - threat.low) * (self.levels / threat.width)).round() * threat.width / self.levels
        return self.model(x + (rounded - x).detach() if x.requires_grad else rounded)


class _Grid:
    """Each row's success on the data's own grid, inside the ball.

    Attributes:
        z: The success, (N, *); x where there is none.
        works: Whether there is one, (N,).
        says: The class that the model gives it, (N,).
    """

    def __init__(self, plan: Plan, x: Tensor, wanted: Tensor, worst: _Worst, goal: Goal) -> None:
        self.plan, self.x, self.wanted, self.worst, self.goal = plan, x, wanted, worst, goal
        self.z, self.works, self.says = x.clone(), torch.zeros_like(worst.success), torch.zeros_like(wanted)
        self.levels = plan.data.levels or 255
        self._try(worst.x_adv, worst.success)
        # A success that stopped just past the boundary often does not survive its rounding.
        if plan.budget is None:
            self._attack_again()

    def _try(self, x_adv: Tensor, success: Tensor) -> None:
        """Round the successes among ``x_adv``, inwards and outwards, and note which still are ones."""
        threat = self.plan.threat
        for outward in (False, True):
            rows = (success & ~self.works).nonzero().squeeze(1)
            if not len(rows):
                return
            tried = threat.snap(x_adv[rows], self.x[rows], self.levels, outward)
            with torch.no_grad():
                outputs = answer(self.plan.model.module, tried)
            met = self.goal.met(outputs, self.wanted[rows]) & threat.allows(tried, self.x[rows])
            self.z[rows[met]], self.works[rows[met]] = tried[met], True
            self.says[rows[met]] = outputs[met].argmax(1)
            self.worst.checks[rows] += 1

    def _attack_again(self) -> None:
        """Run the attacks once more on what did not survive, with the rounding in front of the model."""
        plan, worst = self.plan, self.worst
        model = _OnGrid(plan.model.module, plan.threat, self.levels)
        for name, attack in plan.attacks:
            rows = (worst.success & ~self.works).nonzero().squeeze(1)
            if not len(rows):
                return
            x, wanted = self.x[rows], self.wanted[rows]
            rng = Streams.seeded(plan.seed, worst.index[rows.cpu()].tolist(), f"{name} on the grid", plan.device)
            found = run(attack, model, x, wanted, self._inner(), goal=self.goal, access=plan.access, rng=rng)
            worst.grid_forwards[rows] += found.forwards
            worst.grid_backwards[rows] += found.backwards
            worst.checks[rows] += found.checks
            x_adv, success = worst.x_adv.clone(), torch.zeros_like(self.works)
            x_adv[rows], success[rows] = found.x_adv, found.success
            self._try(x_adv, success)

    def _inner(self) -> Lp:
        """The threat model, an l_inf radius cut to whole steps of the grid, so that rounding cannot leave the ball."""
        threat = self.plan.threat
        step = threat.width / self.levels
        if threat.p != math.inf or not step <= threat.eps < math.inf:
            return threat
        return replace(threat, eps=math.floor(threat.eps / step + 1e-6) * step)


def _tensors(plan: Plan, x: Tensor, worst: _Worst, grid: _Grid | None) -> dict[str, Tensor]:
    tensors = {"x": x.cpu(), "x_adv": worst.x_adv.cpu()}
    if grid is not None:
        whole = (grid.z - plan.threat.low) * (grid.levels / plan.threat.width)
        tensors["x_8bit"] = whole.round().to(torch.uint8).cpu()
    return tensors


def _rows(
    plan: Plan,
    index: Tensor,
    y: Tensor,
    wanted: Tensor,
    clean: Tensor,
    correct: Tensor,
    worst: _Worst,
    grid: _Grid | None,
) -> list[Row]:
    constant = {
        "seed": plan.seed,
        "threat": spec.show(plan.threat, THREATS),
        "model": plan.model.digest[:16],
        "data": plan.data_digest[:16],
        "advkit": __version__,
        "torch": torch.__version__,
    }
    predictions, passes = (clean.argmax(1), worst.outputs.argmax(1)), (worst.checks, worst.grid_forwards, worst.grid_backwards)
    columns = (index, y, wanted, correct, worst.success, worst.distance, *predictions, *passes)
    rows = []
    for i, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        number, label, target, right, success, distance, prediction, adversarial, *counts = values
        checks, grid_forwards, grid_backwards = counts
        each = worst.each[i]
        rows.append(
            {
                "index": number,
                "label": label,
                "target": target if plan.target is not None else None,
                "clean": prediction,
                "correct": right,
                "success": success,
                "success_8bit": bool(grid.works[i]) if grid is not None else None,
                "adversarial": adversarial if success else None,
                "adversarial_8bit": int(grid.says[i]) if grid is not None and grid.works[i] else None,
                "distance": distance if success else None,
                "attack": worst.attack[i],
                "forwards": sum(part["forwards"] for part in each) + grid_forwards,
                "backwards": sum(part["backwards"] for part in each) + grid_backwards,
                "checks": checks,
                "attacks": each,
                **constant,
            }
        )
    return rows
