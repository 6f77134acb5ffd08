"""The work of a benchmark: all cells of one model on one block of examples, one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from advkit.benchmarks.batch import answers, attack_rows
from advkit.benchmarks.cells import Cell, Prepared
from advkit.benchmarks.folder import Row
from advkit.benchmarks.memory import Fit, peak, start_peak
from advkit.benchmarks.store import Columns
from advkit.engine import AttackResult, frozen
from advkit.oracle import Goal


@dataclass(frozen=True)
class Task:
    """All cells of one model on the block of examples that starts at ``start``."""

    model: str
    start: int


@dataclass(frozen=True)
class Done:
    """A cell that is done for a block.

    Attributes:
        cell: The cell.
        start: The first example of the block.
        head: On how many examples the attack was run, in how many seconds, and the peak of the memory.
        columns: A row an example that was attacked, by columns.
        tensors: The closest adversarial examples: ``index``, ``x`` and ``x_adv``.
    """

    cell: Cell
    start: int
    head: Row
    columns: Columns
    tensors: dict[str, Tensor] = field(default_factory=dict)


def work(prepared: Prepared, task: Task, there: Mapping[str, Columns], fit: Fit) -> Iterator[Done]:
    """Run the cells of a task that are not ``there`` yet, by their keys; in order, as each counts on those before it."""
    yield from _Block(prepared, task, there, fit).run()


class _Block:
    """One block of examples and what is known of them."""

    def __init__(self, prepared: Prepared, task: Task, there: Mapping[str, Columns], fit: Fit) -> None:
        self.prepared, self.task, self.there, self.fit = prepared, task, there, fit
        self.cells = prepared.cells[task.model]
        self.plan = next(made for (name, _, _), made in prepared.plans.items() if name == task.model)
        self.index = prepared.data.index[task.start : task.start + prepared.block]
        self.place = {number: i for i, number in enumerate(self.index.tolist())}
        # The closest success of each row so far, by family and seed.
        self.closest: dict[tuple[str | None, int | None], Tensor] = {}

    def run(self) -> Iterator[Done]:
        missing = [cell for cell in self.cells if cell.key not in self.there]
        if not missing:
            return
        x, y = self.prepared.data.batch(self.task.start, self.task.start + self.prepared.block)
        self.x, self.y = x.to(self.plan.device, self.plan.dtype), y.to(self.plan.device)
        with frozen(self.plan.model.module):
            for cell in self.cells:
                if cell.key in self.there:
                    self._note(cell, self.there[cell.key])
                else:
                    done = self._clean(cell) if cell.attack is None else self._attack(cell)
                    self._note(cell, done.columns)
                    yield done

    def _note(self, cell: Cell, columns: Columns) -> None:
        """Count what a cell found."""
        if cell.attack is None:
            self.correct = torch.tensor(columns["correct"])
            return
        closest = self._closest(cell)
        for index, success, distance in zip(*(columns[name] for name in ("index", "success", "distance")), strict=True):
            if success:
                i = self.place[index]
                closest[i] = min(float(closest[i]), distance)

    def _closest(self, cell: Cell) -> Tensor:
        return self.closest.setdefault((cell.family, cell.seed), torch.full((len(self.index),), math.inf, dtype=torch.float64))

    def _clean(self, cell: Cell) -> Done:
        began = time.perf_counter()
        outputs, wrong = answers(self.plan, self.x, self.y, Goal(), self.fit)
        columns = {"index": self.index, "label": self.y, "clean": outputs.argmax(1), "correct": ~wrong}
        rows = {name: column.tolist() for name, column in columns.items()}
        return Done(cell, self.task.start, self._head(len(self.y), began), rows)

    def _attack(self, cell: Cell) -> Done:
        plan = self.prepared.plans[cell.model, str(cell.family), cell.eps]
        attack = self.prepared.attacks[str(cell.attack)]
        left = self.correct if self.prepared.suite.alone else self.correct & (self._closest(cell) > cell.radius)
        rows = (self.correct if cell.eps is None else left).nonzero().squeeze(1)
        start_peak(plan.device)
        began = time.perf_counter()
        if not len(rows):
            return Done(cell, self.task.start, self._head(0, began), {"index": [], "success": [], "distance": []})
        place = rows.to(plan.device)
        given = (self.x[place], self.y[place], self.index[rows], Goal(), int(cell.seed or 0), self.fit)
        found = attack_rows(plan, str(cell.attack), attack, *given)
        head = self._head(len(rows), began)
        return Done(cell, self.task.start, head, _columns(self.index[rows], found, cell.radius), self._kept(rows, found))

    def _head(self, examples: int, began: float) -> Row:
        return {"examples": examples, "seconds": time.perf_counter() - began, "memory": peak(self.plan.device)}

    def _kept(self, rows: Tensor, found: AttackResult) -> dict[str, Tensor]:
        """The closest successes."""
        order = torch.where(found.success, found.distance, math.inf).cpu().argsort(stable=True)
        best = order[: min(self.prepared.suite.keep, int(found.success.sum()))]
        if not len(best):
            return {}
        place = rows[best]
        x = self.x[place.to(self.x.device)]
        return {"index": self.index[place], "x": x.cpu(), "x_adv": found.x_adv[best.to(x.device)].cpu()}


def _columns(index: Tensor, found: AttackResult, eps: float) -> Columns:
    success, distance, says = (column.tolist() for column in (found.success, found.distance, found.outputs.argmax(1)))
    return {
        "index": index.tolist(),
        "success": success,
        # A distance in float32 may exceed the radius by its rounding.
        "distance": [min(far, eps) if broke else None for far, broke in zip(distance, success, strict=True)],
        "adversarial": [said if broke else -1 for said, broke in zip(says, success, strict=True)],
        **{name: getattr(found, name).tolist() for name in ("forwards", "backwards", "checks")},
    }
