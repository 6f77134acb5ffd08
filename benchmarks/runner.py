"""Running a benchmark: every cell that is not there yet, the checks, and the records of it all."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advkit import processes, spec
from advkit.benchmarks import engines, suitefile
from advkit.benchmarks.cells import Prepared, prepare
from advkit.benchmarks.checking import check_model
from advkit.benchmarks.folder import locked, resumable
from advkit.benchmarks.gates import Gate, decisions
from advkit.benchmarks.memory import Fit
from advkit.benchmarks.records import Records, collect, nothing
from advkit.benchmarks.store import Store
from advkit.benchmarks.suitefile import Suite
from advkit.benchmarks.work import Done, Task
from advkit.errors import UsageError


@dataclass(frozen=True)
class Status:
    """Where a benchmark stands.

    Attributes:
        share: The share of the cells that are done, over all blocks.
        text: What was done last.
    """

    share: float
    text: str


def run(
    suite: Suite | str | Path,
    *,
    out: str | Path | None = None,
    models: Mapping[str, Any] | None = None,
    data: Any = None,
    device: str = "cpu",
    engine: str = "local",
    require: Sequence[str | Gate] = (),
    strict: bool = False,
    sequential: bool = False,
    trust_pickle: bool = False,
    probabilities: bool = False,
    command: str = "",
    report: Callable[[Status], None] | None = None,
) -> Records:
    r"""Run a suite: every model against every threat model, and keep a row for each attempt.

    What is in ``out`` and depends on nothing that has changed is not run again: the key of a cell is a digest of the model, the
    data, the attack with its code and its settings, and of the options.

    Arguments:
        suite: A suite, the path of its TOML file, or the name of one that advkit ships.
        out: The folder for the rows; by default, one that is gone when the result is.
        models: Models beside those of the suite, by name: a module, another callable, or a spec.
        data: The examples in place of the suite's: a pair (x, y), an ``advkit.data.Data`` or a spec.
        device: Where to run; under torchrun, ``cuda`` is a GPU for each process.
        engine: ``local``, or ``ray`` for the workers of a Ray cluster.
        require: Gates, as ``robust[linf(8/255)] >= 0.45``; checked before anything runs. What they say of the result is
            ``advkit.benchmarks.gates.decisions``.
        strict: Whether a gate that is not decided fails.
        sequential: Whether to stop after the block at which every gate is decided; the intervals are those that allow it.
        trust_pickle: Whether pickled models may be loaded, which can run any code.
        probabilities: Whether the models return probabilities.
        command: What repeats the run, for reports.
        report: Called after each cell and block.

    Raises:
        UsageError: Something given is not of this form; the message says what was given and what is allowed.

    >>> import torch
    >>> text = 'title = "t"\nattacks = ["fgsm"]\nchecks = false\n[[threats]]\nthreat = "linf"\nradii = [0.1, 0.4]'
    >>> digits, x = (lambda x: x.flatten(1)), torch.eye(3).view(3, 1, 1, 3) * 0.5
    >>> records = run(suitefile.parse(text), models={"m": digits}, data=(x, torch.arange(3)))
    >>> [str(records.robust("m", "linf", eps)) for eps in (0.1, 0.4)]
    ['100.00 % [29.24, 100.00]', '0.00 % [0.00, 70.76]']
    """
    spec.check_choice("engine", engine, engines.ENGINES)
    if sequential and not require:
        raise UsageError(
            "there is nothing to decide: the sequential mode stops when every gate is decided; require at least one"
        )
    wanted = suite if isinstance(suite, Suite) else suitefile.read(suite)
    if out is None and processes.group()[1] > 1:
        raise UsageError("the processes of torchrun share a folder of rows, and none was given; give one (out=)")
    with engines.joined(engine):
        place = processes.device_of(device)
        given = {"models": models, "data": data, "trust_pickle": trust_pickle, "probabilities": probabilities}
        prepared = prepare(wanted, device=place, **given)
        gates = [gate if isinstance(gate, Gate) else Gate.parse(gate) for gate in require]
        wishes = {"require": [gate.text for gate in gates], "strict": strict, "sequential": sequential}
        about = functools.partial(prepared.about, command=command, gates=wishes)
        # What was not measured is said now, not after hours.
        decisions(nothing(about(())))
        with _temporary() if out is None else _locked(Path(out)) as path:
            _Run(prepared, Store(path), engines.ENGINES[engine], about, report).go(sequential)
            records = collect(Store(path))
        if out is None:
            # A folder of its own lasts as long as the records.
            weakref.finalize(records, shutil.rmtree, path, ignore_errors=True)
        return records


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """A folder that is gone if the run comes to nothing."""
    path = Path(tempfile.mkdtemp(prefix="advkit-"))
    try:
        yield path
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """The folder of the rows, locked against other runs; of the processes of one run, the first one holds the lock."""
    with resumable():
        if processes.group()[0] > 0:
            yield path
            return
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; --out should be a folder")
        path.mkdir(parents=True, exist_ok=True)
        lock = locked(path)
        try:
            yield path
        finally:
            os.close(lock)


@dataclass
class _Run:
    """One run of a prepared suite into a store; ``about`` says what ``benchmark.json`` does, for some blocks."""

    prepared: Prepared
    store: Store
    engine: engines.Engine
    about: Callable[[Sequence[int]], dict[str, Any]]
    report: Callable[[Status], None] | None
    done: int = 0

    def __post_init__(self) -> None:
        self.fit = Fit(self.prepared.block)

    def go(self, sequential: bool) -> None:
        """Do all that is left; in the sequential mode, until every gate is decided."""
        starts = list(self.prepared.starts)
        self._claim(starts)
        if not sequential:
            self._tasks(starts)
        else:
            for n, start in enumerate(starts, 1):
                self._tasks([start])
                self._claim(starts[:n])
                if all(decision.verdict != "undecided" for decision in decisions(collect(self.store))):
                    break
        self._check()

    def _claim(self, starts: Sequence[int]) -> None:
        if processes.group()[0] == 0:
            self.store.claim(self.about(starts))
        processes.barrier()

    def _tasks(self, starts: Sequence[int]) -> None:
        models = self._different()
        every = [Task(model, start) for start in starts for model in models]
        left = [task for task in every if engines.missing(self.prepared, self.store, task)]
        self.done += sum(len(self.prepared.cells[task.model]) for task in every if task not in left)
        processes.barrier()
        self.engine(self.prepared, self.store, left, self.fit, self._tell)

    def _different(self) -> list[str]:
        """The models, one of each that are the same under two names and share their rows."""
        keys = {tuple(cell.key for cell in cells): name for name, cells in self.prepared.cells.items()}
        return list(keys.values())

    def _tell(self, done: Done) -> None:
        self.done += 1
        if self.report:
            every = sum(len(self.prepared.cells[name]) for name in self._different()) * len(self.prepared.starts)
            what = done.cell.attack or "clean answers"
            self.report(Status(self.done / every, f"{done.cell.model}, {done.cell.family or 'clean'}, {what}"))

    def _check(self) -> None:
        """Run the checks that were not run yet."""
        if self.prepared.suite.checks and processes.group()[0] == 0:
            for name in self.prepared.models:
                key = self.prepared.checks_key(name)
                if self.store.read_checks(key) is None:
                    if self.report:
                        self.report(Status(1.0, f"{name}, checks"))
                    self.store.write_checks(key, [f.to_json() for f in check_model(self.prepared, name)])
        processes.barrier()
