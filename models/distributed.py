"""The processes of a `torchrun`: rank, size, and communication. Without `torchrun`, there is one process."""

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
    """Join the process group for the duration of the context. If there are GPUs, each process takes its own.

    Without `torchrun`, this does nothing.
    """
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
    """The index of this process; 0 without `torchrun`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes; 1 without `torchrun`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """Print text, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


def gather(value: T) -> list[T]:
    """Collect a value from every process.

    Returns:
        In the first process, the values in the order of ranks; in the others, an empty list.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def broadcast(value: T) -> T:
    """The first process's value, in every process."""
    if dist.is_initialized():
        values = [value]
        dist.broadcast_object_list(values)
        value = values[0]
    return value


def mean_count(count: torch.Tensor) -> torch.Tensor:
    """The mean over the processes of a number of samples.

    Each process divides its sum of losses by it, so that the gradients, averaged over the processes, are those of one
    process with all the images.

    Args:
        count: scalar tensor, the number of this process's samples.

    Returns:
        Scalar tensor, at least 1 / (number of processes), so that no loss is divided by zero.
    """
    if not dist.is_initialized():
        return count.clamp(min=1)
    total = count.clone()
    dist.all_reduce(total)
    return total.clamp(min=1) / world()


def barrier() -> None:
    """Wait until every process has called this."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Copy the first process's buffers, such as batch-norm statistics, to every process, in place."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
