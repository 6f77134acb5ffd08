"""Who does the work of a benchmark: this process, the processes that torchrun started, or the workers of a Ray cluster.

Every task is done by one worker from start to end and its rows do not depend on which, so all of them leave the same files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from advkit.benchmarks.cells import Prepared
from advkit.benchmarks.memory import Fit
from advkit.benchmarks.store import Columns, Store
from advkit.benchmarks.work import Done, Task, work
from advkit.errors import UsageError, first_line
from advkit.processes import barrier, group, together

Tell = Callable[[Done], None]
Engine = Callable[[Prepared, Store, Sequence[Task], Fit, Tell], None]
RETRIES = 5
"""How often a task is given to another worker when its worker dies."""


def missing(prepared: Prepared, store: Store, task: Task) -> bool:
    """Whether a cell of a task is not there."""
    return not all(store.whole(cell.key, task.start) for cell in prepared.cells[task.model])


def local(prepared: Prepared, store: Store, tasks: Sequence[Task], fit: Fit, tell: Tell) -> None:
    """Do the tasks in this process; under torchrun, this process's share of them, and wait for the others."""
    rank, world = group()
    for task in tasks[rank::world]:
        for done in work(prepared, task, _there(prepared, store, task), fit):
            _keep(store, done, tell)
    barrier()


def ray(prepared: Prepared, store: Store, tasks: Sequence[Task], fit: Fit, tell: Tell) -> None:
    """Do the tasks on the Ray cluster that :func:`joined` connected to.

    A task whose worker dies is given to another; what was finished is here and stays.

    Raises:
        UsageError: The models cannot be sent to workers, or a task's workers died again and again.
    """
    import ray as cluster

    threads = torch.get_num_threads()
    gpus = 1 if next(iter(prepared.plans.values())).device.type == "cuda" else 0
    try:
        shared = cluster.put(prepared)
    except Exception as error:  # what a model of the user's raises when it is pickled is its own
        why = first_line(error.__cause__ or error)
        raise UsageError(f"the models cannot be sent to workers ({why}); use --engine local") from error
    # What a task asks for decides only where it runs; more than any machine has would wait for ever.
    most = max((int(node["Resources"].get("CPU", 0)) for node in cluster.nodes()), default=0)
    remote = cluster.remote(num_cpus=min(threads, most or threads), num_gpus=gpus, max_retries=RETRIES)(_finished)
    waiting = [remote.remote(shared, task, _there(prepared, store, task), fit.size, threads) for task in tasks]
    try:
        while waiting:
            (ready, *_), waiting = cluster.wait(waiting)
            for done in _result(cluster, ready):
                _keep(store, done, tell)
    finally:
        # Nobody waits for the others any more.
        for one in waiting:
            cluster.cancel(one, force=True)


def _result(cluster: Any, ready: Any) -> list[Done]:
    """What a task made; what it raised is raised here as it was there."""
    try:
        done: list[Done] = cluster.get(ready)
    except cluster.exceptions.RayTaskError as error:
        raise error.cause from None
    except cluster.exceptions.RayError as error:
        died = f"a task's worker died {RETRIES + 1} times ({first_line(error)})"
        raise UsageError(f"{died}; what was finished is kept, see Ray's logs") from None
    return done


def _finished(prepared: Prepared, task: Task, there: dict[str, Columns], size: int, threads: int) -> list[Done]:
    torch.set_num_threads(threads)
    return list(work(prepared, task, there, Fit(size)))


ENGINES: dict[str, Engine] = {"local": local, "ray": ray}
"""The engines by name."""


def _there(prepared: Prepared, store: Store, task: Task) -> dict[str, Columns]:
    """The rows of the cells that are done."""
    examples = prepared.data.index[task.start : task.start + prepared.block].tolist()
    found = {}
    for cell in prepared.cells[task.model]:
        there = store.read(cell.key, task.start, cell.attack)
        if there is not None:
            found[cell.key] = there[1]
            of = there[1]["index"]
            if not set(of) <= set(examples) or (cell.attack is None and list(of) != examples):
                raise store.damaged(cell.key, task.start, "its rows are of other examples")
    return found


def _keep(store: Store, done: Done, tell: Tell) -> None:
    store.write(done.cell.key, done.start, done.head, done.columns, done.tensors)
    tell(done)


@contextlib.contextmanager
def joined(engine: str) -> Iterator[None]:
    """What divides the work, for as long as this lasts: the processes that torchrun started, or a Ray cluster.

    The cluster is the one that RAY_ADDRESS names, else one on this machine; a connection that is there is used and stays.

    Raises:
        UsageError: Both were asked for, or there is no Ray, or no cluster.
    """
    if engine == "ray":
        with _cluster():
            yield
    else:
        with together():
            yield


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    if group()[1] > 1:
        raise UsageError("torchrun and the engine ray were both given; the work is divided by one of them")
    try:
        import ray as cluster
    except ImportError:
        raise UsageError("the engine ray needs Ray; install it with pip install advkit[ray], or use --engine local") from None
    if cluster.is_initialized():
        yield
        return
    # Nothing is sent unasked.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        cluster.init(log_to_driver=False, include_dashboard=False)
    except Exception as error:  # of many kinds
        where = os.environ.get("RAY_ADDRESS")
        named = f"the Ray cluster at {where} (RAY_ADDRESS)" if where else "a Ray cluster on this machine"
        raise UsageError(f"cannot connect to {named}: {first_line(error)}") from error
    try:
        yield
    finally:
        cluster.shutdown()
