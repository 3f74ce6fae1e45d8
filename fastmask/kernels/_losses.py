"""What losses share: the last step adds partial sums in a fixed order and divides them by the number of terms.

    loss = scale * sum of `sums`        scale = 1 / max(sum of `counts`, 1) for the mean, 1 for the sum

One program adds both lists, block by block and then within a block: same inputs, same bits. An empty set of terms has
the loss 0. `scale` is kept for the backward.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import divide, jit, tl, triton_dtype

REDUCTIONS = ("mean", "sum")

# All rows of a training step in one block: 512 masks, or 256 persons of 17 keypoints in five.
BLOCK = 1024
NUM_WARPS = 8


def reduce_reference(total: Tensor, count: int, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss and its scale, from the sum of all terms and their number."""
    scale = total.new_tensor(1 / max(count, 1) if reduction == "mean" else 1.0)
    return total / max(count, 1) if reduction == "mean" else total, scale


@jit(do_not_specialize=["size"])
def _reduce_loss_kernel(
    sums,  # [size], float32 or float64
    counts,  # [size], int32
    loss,  # one element
    scale,  # one element
    size,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    total, count = tl.zeros((BLOCK,), COMPUTE), tl.zeros((BLOCK,), tl.int64)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(sums + index, mask=index < size, other=0.0)
        count += tl.load(counts + index, mask=index < size, other=0)
    total = tl.sum(total, 0)
    divisor = tl.maximum(tl.sum(count, 0), 1).to(COMPUTE) if MEAN else tl.full((), 1.0, COMPUTE)
    tl.store(loss, divide(total, divisor))
    tl.store(scale, divide(tl.full((), 1.0, COMPUTE), divisor))


@lru_cache(maxsize=8)
def _prepared(reduction: str, dtype: torch.dtype) -> Launch:
    return Launch(
        _reduce_loss_kernel, MEAN=reduction == "mean", BLOCK=BLOCK, COMPUTE=triton_dtype(dtype), num_warps=NUM_WARPS
    )


def launch_reduce(sums: Tensor, counts: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss and its scale, on the current device, from partial sums and the number of terms in each."""
    loss, scale = sums.new_empty(()), sums.new_empty(())
    _prepared(reduction, sums.dtype)((1,), sums, counts, loss, scale, sums.numel())
    return loss, scale


def no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    """The backward of a loss's backward."""
    del ctx, grads
    raise NotImplementedError("loss: expected a first derivative, got a second one")
