"""Boxes in sorted order, for kernels that read all of them: a load each, instead of two dependent ones."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import ceil_div, compute_dtype, jit, tl, triton_dtype
from fastmask.kernels.nms.suppression import Candidates, load_box, store_box

ROWS = 128  # positions a program; sorted boxes are padded to a multiple


class SortedBoxes(NamedTuple):
    """The first arguments of kernels that read sorted boxes; M is N rounded up to a multiple of `ROWS`."""

    boxes: Tensor  # [B, M, 4] float32 or float64; NaN, which suppresses nothing, after the valid ones
    classes: Tensor | None  # [B, M]


@jit(do_not_specialize=["num_boxes", "num_rows", "max_output"])
def gather_boxes_kernel(
    boxes,  # [B, N, 4]
    classes,  # [B, N] or None
    order,  # [B, N]
    num_valid,  # [B] or None
    sorted_boxes,  # [B, M, 4]
    sorted_classes,  # [B, M] or None
    indices,  # [B, max_output], set to -1
    num_boxes,
    num_rows,  # M
    max_output,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tl.store(indices + segment * max_output + row, tl.full((ROWS,), -1, tl.int64), mask=row < max_output)
    last = num_boxes if num_valid is None else tl.load(num_valid + segment).to(tl.int32)
    inside = row < last
    index = tl.load(order + segment * num_boxes + row, mask=inside, other=0) + segment * num_boxes
    box = load_box(boxes, classes, index, inside, COMPUTE)
    store_box(sorted_boxes, sorted_classes, segment * num_rows + row, box, row < num_rows)


def empty_sorted(boxes: Tensor, classes: Tensor | None) -> SortedBoxes:
    batch, num_boxes = boxes.shape[:2]
    num_rows = ceil_div(num_boxes, ROWS) * ROWS
    dtype, device = compute_dtype(boxes.dtype), boxes.device
    return SortedBoxes(
        torch.empty(batch, num_rows, 4, dtype=dtype, device=device),
        None if classes is None else torch.empty(batch, num_rows, dtype=classes.dtype, device=device),
    )


@lru_cache(maxsize=64)
def _prepared(dtype: torch.dtype) -> Launch:
    return Launch(gather_boxes_kernel, ROWS=ROWS, COMPUTE=triton_dtype(dtype))


def launch_gather(candidates: Candidates, indices: Tensor) -> SortedBoxes:
    """The boxes in sorted order; sets `indices` to -1."""
    boxes, classes, order, _ = candidates
    (batch, num_boxes), max_output = order.shape, indices.shape[1]
    out = empty_sorted(boxes, classes)
    num_rows = out.boxes.shape[1]
    _prepared(boxes.dtype)(
        (batch, ceil_div(max(num_rows, max_output), ROWS)),
        *candidates,
        *out,
        indices,
        num_boxes,
        num_rows,
        max_output,
    )
    return out
