"""The processes that `torchrun` started, if it did: who this one is, and objects between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the other processes, each on its own GPU where there are any; a process of its own joins nobody."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """Prints, in the first process alone."""
    if rank() == 0:
        print(text, flush=True)


def gather(value: T) -> list[T]:
    """Every process's value in the order of ranks; an empty list on all ranks but the first."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def broadcast(value: T) -> T:
    """The first rank's value."""
    if dist.is_initialized():
        values = [value]
        dist.broadcast_object_list(values)
        value = values[0]
    return value


def mean_count(count: torch.Tensor) -> torch.Tensor:
    """The mean of a number of samples over the processes, at least 1 over all: what a loss of sums is divided by, so
    that gradients averaged over processes are those of one process with all the images."""
    if not dist.is_initialized():
        return count.clamp(min=1)
    total = count.clone()
    dist.all_reduce(total)
    return total.clamp(min=1) / world()


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_buffers(module: torch.nn.Module) -> None:
    """The first rank's buffers, in all."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
