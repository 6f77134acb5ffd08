"""One batch of an evaluation: every attack in turn, the closest success of each row, and its record.

Inside a fixed radius an example that one attack broke is not given to the next; in a search for the closest example the
closest of all attacks counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from advkit.benchmarks.folder import Batch, Row
from advkit.benchmarks.memory import Fit, joined
from advkit.benchmarks.plan import Plan, threat_name
from advkit.engine import Attack, AttackResult, run
from advkit.errors import UsageError
from advkit.oracle import Goal, answer
from advkit.sound import wav
from advkit.streams import Streams
from advkit.threat import Change, Lp
from advkit.version import __version__

GRID = "rounding to the grid"
"""What the time of testing and attacking again on the data's grid goes by."""


def attack_batch(plan: Plan, first: int, last: int, fit: Fit, tell: Callable[[int, int], None]) -> Batch:
    """Run a plan's attacks on the examples from ``first`` up to ``last``; ``tell`` hears how many are left after each."""
    x, y = plan.data.batch(first, last)
    x, y = x.to(plan.device, plan.dtype), y.to(plan.device)
    index = plan.data.index[first:last]
    clean, wrong = answers(plan, x, y, Goal(), fit)
    correct = ~wrong
    goal = Goal(targeted=plan.target is not None)
    wanted = _targets(plan, y, clean, index) if goal.targeted else y
    worst = _Worst(x, clean, index, plan)
    times: list[Row] = []
    for k, (name, attack) in enumerate(plan.attacks):
        left = correct & ~worst.success if plan.threat.eps < math.inf and not plan.alone else correct
        rows = left.nonzero().squeeze(1)
        began = time.perf_counter()
        if len(rows):
            given = (x[rows], wanted[rows], index[rows.cpu()])
            worst.add(name, rows, attack_rows(plan, name, attack, *given, goal, plan.seed, fit))
        times.append({"start": first, "attack": name, "examples": len(rows), "seconds": time.perf_counter() - began})
        tell(int((correct & ~worst.success).sum()), k)
    began = time.perf_counter()
    grid = _Grid(plan, x, wanted, worst, goal, fit) if plan.quantize else None
    if grid is not None:
        again = int((worst.grid_forwards > 0).sum())
        times.append({"start": first, "attack": GRID, "examples": again, "seconds": time.perf_counter() - began})
    return Batch(_rows(plan, index, y, wanted, clean, correct, worst, grid), times, _tensors(plan, x, worst, grid))


def attack_rows(
    plan: Plan, name: str, attack: Attack, x: Tensor, y: Tensor, index: Tensor, goal: Goal, seed: int, fit: Fit
) -> AttackResult:
    """Run one attack as a plan says on inputs (M, *) with labels or targets (M,) and numbers (M,), as many at a time as fit."""

    def part(rows: Tensor) -> AttackResult:
        return run(
            attack,
            plan.model.module,
            x[rows],
            y[rows],
            plan.threat,
            goal=goal,
            access=plan.access,
            budget=plan.budget,
            rng=Streams.seeded(seed, index[rows.cpu()].tolist(), name, plan.device),
            fast=plan.fast,
            votes=plan.votes,
        )

    return joined(fit.parts(torch.arange(len(x), device=x.device), part))


def answers(plan: Plan, x: Tensor, y: Tensor, goal: Goal, fit: Fit) -> tuple[Tensor, Tensor]:
    """The outputs for ``x``, (N, K), and which meet the goal, (N,): in most of as many answers as the plan has votes."""
    every = torch.arange(len(x), device=x.device)
    parts = fit.parts(every, lambda rows: _answers(plan, x[rows], y[rows], goal))
    return torch.cat([outputs for outputs, _ in parts]), torch.cat([met for _, met in parts])


def _answers(plan: Plan, x: Tensor, y: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        answers = [answer(plan.model.module, x) for _ in range(plan.votes)]
    met = torch.stack([goal.met(outputs, y) for outputs in answers])
    most = 2 * met.sum(0) > plan.votes
    # The first answer that says what most of them say.
    first = (met == most).int().argmax(0)
    return torch.stack(answers)[first, torch.arange(len(x), device=x.device)], most


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


class _Worst:
    """The closest success of each row over several attacks, and what each attack did."""

    def __init__(self, x: Tensor, clean: Tensor, index: Tensor, plan: Plan) -> None:
        self.index = index
        self.x_adv, self.outputs = x.clone(), clean.clone()
        self.change = None if isinstance(plan.threat, Lp) else plan.threat.zero(x)
        self.success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.once, self.share = self.success.clone(), torch.zeros(len(x), dtype=x.dtype, device=x.device)
        self.distance = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        self.attack: list[str | None] = [None] * len(x)
        self.each: list[list[Row]] = [[] for _ in range(len(x))]
        # The clean passes that decide which rows are attacked.
        self.checks = torch.full((len(x),), plan.votes, dtype=torch.int64, device=x.device)
        self.grid_forwards, self.grid_backwards = torch.zeros_like(self.checks), torch.zeros_like(self.checks)

    def add(self, name: str, rows: Tensor, result: AttackResult) -> None:
        """Note what an attack did to ``rows``."""
        closer = result.success & (result.distance < self.distance[rows])
        who = rows[closer]
        self.x_adv[who], self.outputs[who] = result.x_adv[closer], result.outputs[closer]
        self.distance[who], self.success[who] = result.distance[closer], True
        self.share[who] = result.share[closer]
        if self.change is not None and result.change is not None:
            self.change[who] = result.change[closer]
        self.once[rows] |= result.once
        self.checks[rows] += result.checks
        for i in who.tolist():
            self.attack[i] = name
        columns = (result.success, result.distance, result.forwards, result.backwards)
        for i, success, distance, forwards, backwards in zip(rows.tolist(), *(c.tolist() for c in columns), strict=True):
            passes = {"forwards": forwards, "backwards": backwards}
            self.each[i].append({"attack": name, "success": success, "distance": distance if success else None, **passes})


class _OnGrid(nn.Module):
    """The model behind a rounding of its input to the grid, through which gradients pass as if it were not there."""

    def __init__(self, model: Callable[[Tensor], Any], threat: Lp | Change, levels: int) -> None:
        super().__init__()
        self.model, self.threat, self.levels = model, threat, levels

    def forward(self, x: Tensor) -> Any:
        """What the model says of the rounded input."""
        low, width = self.threat.low, self.threat.high - self.threat.low
        with torch.no_grad():
            rounded = low + ((x - low) * (self.levels / width)).round() * width / self.levels
        return self.model(x + (rounded - x).detach() if x.requires_grad else rounded)


class _Grid:
    """Each row's success on the data's own grid, inside the ball.

    Attributes:
        z: The success, (N, *); x where there is none.
        works: Whether there is one, (N,).
        says: The class that the model gives it, (N,).
    """

    def __init__(self, plan: Plan, x: Tensor, wanted: Tensor, worst: _Worst, goal: Goal, fit: Fit) -> None:
        self.plan, self.x, self.wanted, self.worst, self.goal, self.fit = plan, x, wanted, worst, goal, fit
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
            tried = self.read(self.stored(threat.snap(x_adv[rows], self.x[rows], self.levels, outward)))
            outputs, met = answers(self.plan, tried, self.wanted[rows], self.goal, self.fit)
            met &= threat.allows(tried, self.x[rows])
            self.z[rows[met]], self.works[rows[met]] = tried[met], True
            self.says[rows[met]] = outputs[met].argmax(1)
            self.worst.checks[rows] += self.plan.votes

    def stored(self, z: Tensor) -> Tensor:
        """What a file holds of inputs (N, *): uint8 for 8-bit data; int16 for sounds, where 1 itself has no number."""
        threat = self.plan.threat
        whole = ((z - threat.low) * (self.levels / (threat.high - threat.low))).round()
        return whole.to(torch.uint8) if self.levels == 255 else (whole - wav.STEPS).clamp(max=wav.STEPS - 1).to(torch.int16)

    def read(self, stored: Tensor) -> Tensor:
        """The inputs (N, *) that a file gives back."""
        whole = stored.to(self.x.dtype) + (0 if self.levels == 255 else wav.STEPS)
        return whole / self.levels * (self.plan.threat.high - self.plan.threat.low) + self.plan.threat.low

    def _attack_again(self) -> None:
        """Run the attacks once more on what did not survive, with the rounding in front of the model."""
        plan, worst = self.plan, self.worst
        model = _OnGrid(plan.model.module, plan.threat, self.levels)
        quick = None if plan.fast is None else _OnGrid(plan.fast, plan.threat, self.levels)
        for name, attack in plan.attacks:
            rows = (worst.success & ~self.works).nonzero().squeeze(1)
            if not len(rows):
                return
            x, wanted = self.x[rows], self.wanted[rows]
            rng = Streams.seeded(plan.seed, worst.index[rows.cpu()].tolist(), f"{name} on the grid", plan.device)
            found = run(
                attack,
                model,
                x,
                wanted,
                self._inner(),
                goal=self.goal,
                access=plan.access,
                rng=rng,
                fast=quick,
                votes=plan.votes,
            )
            worst.grid_forwards[rows] += found.forwards
            worst.grid_backwards[rows] += found.backwards
            worst.checks[rows] += found.checks
            x_adv, success = worst.x_adv.clone(), torch.zeros_like(self.works)
            x_adv[rows], success[rows] = found.x_adv, found.success
            self._try(x_adv, success)

    def _inner(self) -> Lp | Change:
        """The threat model; the radius of an l_inf ball is cut to whole steps of the grid, so that rounding cannot leave it."""
        threat = self.plan.threat
        step = (threat.high - threat.low) / self.levels
        if not isinstance(threat, Lp) or threat.p != math.inf or not step <= threat.eps < math.inf:
            return threat
        return replace(threat, eps=math.floor(threat.eps / step + 1e-6) * step)


def _tensors(plan: Plan, x: Tensor, worst: _Worst, grid: _Grid | None) -> dict[str, Tensor]:
    tensors = {"x": x.cpu(), "x_adv": worst.x_adv.cpu()}
    if grid is not None:
        tensors["x_8bit" if grid.levels == 255 else "x_16bit"] = grid.stored(grid.z).cpu()
    if worst.change is not None:
        tensors["change"] = worst.change.cpu()
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
        "threat": threat_name(plan.threat),
        "model": plan.model.digest[:16],
        "data": plan.data_digest[:16],
        "advkit": __version__,
        "torch": torch.__version__,
    }
    predictions, passes = (clean.argmax(1), worst.outputs.argmax(1)), (worst.checks, worst.grid_forwards, worst.grid_backwards)
    columns = (index, y, wanted, correct, worst.success, worst.once, worst.share, worst.distance, *predictions, *passes)
    rows = []
    for i, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        number, label, target, right, success, once, share, distance, prediction, adversarial, *counts = values
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
                "once": once,
                "share": share if success else None,
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
