"""NMS with a small output in one launch: one program per segment scans the sorted boxes until the output is full.

Each block of sorted boxes is tested against the boxes kept so far, then against itself. Most candidates of a
detector are never read.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import compute_dtype, jit, tl, triton_dtype
from fastmask.kernels.nms.suppression import (
    Candidates,
    load_box,
    load_threshold,
    needs_division,
    store_box,
    suppressed_by_kept,
    suppresses_pairs,
    threshold_bits,
)


@jit(do_not_specialize=["num_boxes", "max_output", "threshold_bits"])
def scan_boxes_kernel(
    boxes,  # [B, N, 4]
    classes,  # [B, N] or None
    order,  # [B, N] by falling score
    num_valid,  # [B] length of the prefix of `order` that takes part, or None: all N
    kept_boxes,  # [B, max_output, 4]
    kept_classes,  # [B, max_output] or None
    indices,  # [B, max_output]
    count,  # [B]
    num_boxes,
    max_output,
    threshold_bits,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    boxes += segment * num_boxes * 4
    order += segment * num_boxes
    kept_boxes += segment * max_output * 4
    indices += segment * max_output
    if classes is not None:
        classes += segment * num_boxes
        kept_classes += segment * max_output
    threshold = load_threshold(threshold_bits, COMPUTE)
    last = num_boxes if num_valid is None else tl.load(num_valid + segment).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    # Boxes are loaded a block ahead and their indices two: a crowd that never fills the output takes as many steps as
    # there are blocks.
    index = tl.load(order + lane, mask=lane < last, other=0)
    next_index = tl.load(order + BLOCK + lane, mask=BLOCK + lane < last, other=0)
    box = load_box(boxes, classes, index, lane < last, COMPUTE)
    first = 0
    kept = 0
    while (first < last) & (kept < max_output):
        following = first + BLOCK + lane
        next_box = load_box(boxes, classes, next_index, following < last, COMPUTE)
        after_next = tl.load(order + BLOCK + following, mask=BLOCK + following < last, other=0)
        suppressed = suppressed_by_kept(box, kept_boxes, kept_classes, kept, threshold, BLOCK, STEP, COMPUTE, DIVIDE)
        candidate = ((first + lane < last) & ~suppressed).to(tl.int32)
        if tl.max(candidate, 0) != 0:
            hit = (suppresses_pairs(box, box, threshold, DIVIDE) & (lane[:, None] < lane[None, :])).to(tl.int32)
            stays = candidate
            changed = 1
            while changed != 0:
                remaining = candidate & ~tl.max(hit & stays[:, None], 0)
                changed = tl.max(remaining ^ stays, 0)
                stays = remaining
            place = kept + tl.cumsum(stays, 0) - 1
            stored = (stays != 0) & (place < max_output)
            tl.store(indices + place, index, mask=stored)
            store_box(kept_boxes, kept_classes, place, box, stored)
            kept = tl.minimum(kept + tl.sum(stays, 0), max_output)
            tl.debug_barrier()  # the next block reads the boxes that this one stored
        index, next_index, box = next_index, after_next, next_box
        first += BLOCK
    tl.store(count + segment, kept)
    for first in range(kept, max_output, BLOCK):
        tl.store(indices + first + lane, tl.full((BLOCK,), -1, tl.int64), mask=first + lane < max_output)


@lru_cache(maxsize=64)
def _prepared(dtype: torch.dtype, divide: bool) -> Launch:
    return Launch(
        scan_boxes_kernel,
        BLOCK=32 if dtype == torch.float64 else 64,
        STEP=16,
        COMPUTE=triton_dtype(dtype),
        DIVIDE=divide,
        num_warps=16,  # 80 registers; 8 warps would need 128 and half as many instructions again
        enable_fp_fusion=False,
    )


def launch_scan(candidates: Candidates, iou_threshold: float, indices: Tensor, count: Tensor) -> None:
    """Write `indices[B, max_output]` and `count[B]`."""
    boxes, classes, order, _ = candidates
    dtype, num_boxes = boxes.dtype, order.shape[1]
    batch, max_output = indices.shape
    _prepared(dtype, needs_division(iou_threshold, dtype))(
        (batch,),
        *candidates,
        torch.empty(batch, max_output, 4, dtype=compute_dtype(dtype), device=boxes.device),
        None if classes is None else classes.new_empty(batch, max_output),
        indices,
        count,
        num_boxes,
        max_output,
        threshold_bits(iou_threshold, dtype),
    )
