"""Who does the work of a benchmark: this process, the processes that torchrun started, or the workers of a Ray cluster.

Every task is done by one worker from start to end and its rows do not depend on which, so all of them leave the same files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from advkit.benchmarks.cells import Prepared
from advkit.benchmarks.folder import Row
from advkit.benchmarks.memory import Fit
from advkit.benchmarks.store import Store
from advkit.benchmarks.work import Done, Task, work
from advkit.errors import UsageError

Tell = Callable[[Done], None]
RETRIES = 5
"""How often a task is given to another worker when its worker dies."""


def missing(prepared: Prepared, store: Store, task: Task) -> bool:
    """Whether a cell of a task is not there."""
    return any(store.read(cell.key, task.start) is None for cell in prepared.cells[task.model])


def local(prepared: Prepared, store: Store, tasks: Sequence[Task], fit: Fit, tell: Tell) -> None:
    """Do the tasks in this process; under torchrun, this process's share of them, and wait for the others."""
    rank, world = group()
    for task in tasks[rank::world]:
        for done in work(prepared, task, _there(prepared, store, task), fit):
            _keep(store, done, tell)
    barrier()


def ray(prepared: Prepared, store: Store, tasks: Sequence[Task], fit: Fit, tell: Tell) -> None:
    """Do the tasks on a Ray cluster: the one that RAY_ADDRESS names, else one on this machine.

    A task whose worker dies is given to another; what was finished is here and stays.

    Raises:
        UsageError: Ray is not installed, or a task's workers died again and again.
    """
    try:
        import ray as cluster
    except ImportError:
        raise UsageError("the engine ray needs Ray; install it with pip install advkit[ray], or use --engine local") from None
    if not cluster.is_initialized():
        # Nothing is sent unasked.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cluster.init(log_to_driver=False, include_dashboard=False)
    threads = torch.get_num_threads()
    gpus = 1 if next(iter(prepared.plans.values())).device.type == "cuda" else 0
    remote = cluster.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(_finished)
    shared = cluster.put(prepared)
    waiting = [remote.remote(shared, task, _there(prepared, store, task), fit.size, threads) for task in tasks]
    while waiting:
        (ready, *_), waiting = cluster.wait(waiting)
        try:
            finished = cluster.get(ready)
        except cluster.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except cluster.exceptions.WorkerCrashedError:
            raise UsageError(f"a task's worker died {RETRIES + 1} times; what was finished is kept, see Ray's logs") from None
        for done in finished:
            _keep(store, done, tell)


def _finished(prepared: Prepared, task: Task, there: dict[str, list[Row]], size: int, threads: int) -> list[Done]:
    torch.set_num_threads(threads)
    return list(work(prepared, task, there, Fit(size)))


ENGINES = {"local": local, "ray": ray}
"""The engines by name."""


def _there(prepared: Prepared, store: Store, task: Task) -> dict[str, list[Row]]:
    """The rows of the cells that are done."""
    found = {cell.key: store.read(cell.key, task.start) for cell in prepared.cells[task.model]}
    return {key: pair[1] for key, pair in found.items() if pair is not None}


def _keep(store: Store, done: Done, tell: Tell) -> None:
    store.write(done.cell.key, done.start, done.head, done.rows, done.tensors)
    tell(done)


def group() -> tuple[int, int]:
    """The number of this process among those that torchrun started, and how many there are; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    """Wait for the other processes that torchrun started."""
    if group()[1] > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The processes that torchrun started as a group, made here if there is none."""
    if group()[1] == 1 or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def device_of(device: str) -> str:
    """The device of this process: under torchrun each has a GPU of its own."""
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if device == "cuda" and local_rank is not None else device
