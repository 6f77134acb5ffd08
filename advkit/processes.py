"""The processes that torchrun started: which of them this is, and what they do together."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch

from advkit.errors import UsageError

PATIENCE = datetime.timedelta(days=30)
"""How long a process waits for the others: until their work is done, which may take far longer than torch would wait."""


def group() -> tuple[int, int]:
    """The number of this process among those that torchrun started, and how many there are; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """The processes that torchrun started can talk to each other for as long as this lasts."""
    if group()[1] == 1 or torch.distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes that torchrun started.

    Raises:
        UsageError: One of them stopped.
    """
    if group()[1] == 1:
        return
    with _others():
        torch.distributed.barrier()


def mean(tensor: torch.Tensor) -> None:
    """Replace a tensor, in place, by its mean over the processes that torchrun started.

    Raises:
        UsageError: One of them stopped.
    """
    world = group()[1]
    if world == 1:
        return
    with _others():
        torch.distributed.all_reduce(tensor)
    tensor /= world


def share(tensor: torch.Tensor) -> None:
    """Replace a tensor, in place, by that of the first of the processes that torchrun started.

    Raises:
        UsageError: One of them stopped.
    """
    if group()[1] == 1 or not tensor.numel():
        return
    # As bytes in a row: not every backend sends every type, or any order in memory.
    value = tensor.detach().contiguous()
    with _others():
        torch.distributed.broadcast(value.flatten().view(torch.uint8), 0)
    tensor.detach().copy_(value)


@contextlib.contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UsageError("another process of this run stopped; it said why, and what was finished is kept") from error


def device_of(device: str) -> str:
    """The device of this process: under torchrun each has a GPU of its own."""
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if device == "cuda" and local_rank is not None else device
