"""How far an adversary can push a model: the evaluation behind ``advkit attack`` and ``advkit.evaluate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit import spec
from advkit.benchmarks.batch import attack_batch
from advkit.benchmarks.folder import Batch, Folder, Row, resumable
from advkit.benchmarks.memory import Fit
from advkit.benchmarks.plan import Plan, plan
from advkit.benchmarks.result import Evaluation
from advkit.data import Data
from advkit.engine import Attack, frozen
from advkit.errors import UsageError
from advkit.oracle import Access
from advkit.threat import Change, Lp


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


def evaluate(
    model: Any,
    data: Any,
    *,
    threat: str | Lp | Change,
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
    votes: int | None = None,
    fast: bool = False,
    compile: bool = False,
    out: str | Path | None = None,
    report: Callable[[Status], None] | None = None,
) -> Evaluation:
    """Attack a model on data and say how robust it is, example by example.

    Arguments:
        model: A module, any callable from inputs (N, *) to logits (N, K), what ``advkit.models.load`` returns, or its spec.
            If it has a method ``adaptive``, from an attack to one that knows of the model's defense, the attacks are first
            run as they are, and then those that it makes of them, on what is left.
        data: A pair (x, y) of tensors or arrays, an ``advkit.data.Data``, or its spec (``mnist-5k``).
        threat: What the adversary may change: ``linf(8/255)``, ``linf`` to search for the closest example, ``rotation(30)``;
            the range of the data is the data's own unless the spec gives low and high.
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
        votes: For a model whose answers change from call to call: of how many answers more than half must be right for a clean
            input, and fooled for a success; by default one, and five where the attacks that a defense makes meet a random one.
        fast: Whether a copy of the model in bfloat16 answers the attacks; the model itself confirms every success.
        compile: Whether ``torch.compile`` translates that copy.
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
    examples = examples_of(data, split, limit, seed)
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
        votes=votes,
        fast=fast,
        compile=compile,
        adaptive=True,
    )
    return execute(planned, Path(out) if out is not None else None, report)


def execute(plan: Plan, out: Path | None, report: Callable[[Status], None] | None) -> Evaluation:
    """Run what a plan says, in memory or in a folder."""
    identity = plan.identity()
    if out is not None:
        with resumable():
            return _execute_in(plan, out, identity, report)
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


def examples_of(data: Any, split: str, limit: int | None, seed: int) -> Data:
    """The examples of a pair (x, y), of an ``advkit.data.Data`` or of a spec, at most ``limit`` of them.

    Raises:
        UsageError: It is something else.
    """
    if limit is not None:
        spec.check_whole("the limit", limit, 1)
    if isinstance(data, str):
        return data_by_name.load(data, split=split, limit=limit, seed=seed)
    if isinstance(data, Data):
        return data.limited(limit, seed)
    if isinstance(data, tuple | list) and len(data) == 2:
        return data_by_name.from_tensors(*data).limited(limit, seed)
    raise UsageError(f"the data is {type(data).__name__}; it should be a pair (x, y), an advkit.data.Data or a spec")


def _batches(plan: Plan, start: int, rows: list[Row], report: Callable[[Status], None] | None) -> Iterator[Batch]:
    """The batches from the example at ``start``; ``rows`` are the records before it."""
    total, robust = len(plan.data), sum(row["correct"] and not row["success"] for row in rows)
    fit = Fit(plan.batch_size)
    for first in range(start, total, plan.batch_size):
        last = min(first + plan.batch_size, total)

        def tell(left: int, k: int, first: int = first, last: int = last, before: int = robust) -> None:
            if report:
                done = first + (last - first) * (k + 1) / len(plan.attacks)
                report(Status(start, done, total, last, before + left, plan.attacks[k][0]))

        with frozen(plan.model.module):
            batch = attack_batch(plan, first, last, fit, tell)
        robust += sum(row["correct"] and not row["success"] for row in batch.rows)
        yield batch
