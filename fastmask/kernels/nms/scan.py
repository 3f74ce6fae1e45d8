"""NMS with a small output in one launch: one program per segment scans the sorted boxes until the output is full.

Each block of sorted boxes is tested against the boxes kept so far, then against itself. Most candidates of a
detector are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.kernels._runtime import float_of, jit, tl, triton_dtype
from fastmask.kernels.nms.suppression import (
    Candidates,
    load_box,
    suppressed_by_kept,
    suppresses_pairs,
    threshold_bits,
)


@jit(do_not_specialize=["num_boxes", "max_output", "threshold_bits"])
def scan_boxes_kernel(
    boxes,  # [B, N, 4]
    classes,  # [B, N] or None
    order,  # [B, N] by falling score
    num_valid,  # [B] length of the prefix of `order` that takes part
    indices,  # [B, max_output], filled with -1
    count,  # [B]
    num_boxes,
    max_output,
    threshold_bits,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    boxes += segment * num_boxes * 4
    order += segment * num_boxes
    indices += segment * max_output
    if classes is not None:
        classes += segment * num_boxes
    threshold = float_of(threshold_bits, COMPUTE)
    last = tl.load(num_valid + segment).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    first = 0
    kept = 0
    while (first < last) & (kept < max_output):
        inside = first + lane < last
        index = tl.load(order + first + lane, mask=inside, other=0)
        box = load_box(boxes, classes, index, inside, COMPUTE)
        suppressed = suppressed_by_kept(box, boxes, classes, indices, 0, kept, threshold, BLOCK, STEP, COMPUTE)
        candidate = (inside & ~suppressed).to(tl.int32)
        hit = (suppresses_pairs(box, box, threshold) & (lane[:, None] < lane[None, :])).to(tl.int32)
        stays = candidate
        changed = 1
        while changed != 0:
            following = candidate & ~tl.max(hit & stays[:, None], 0)
            changed = tl.max(following ^ stays, 0)
            stays = following
        place = kept + tl.cumsum(stays, 0) - 1
        tl.store(indices + place, index, mask=(stays != 0) & (place < max_output))
        tl.debug_barrier()  # the next block reads what this one stored
        kept = tl.minimum(kept + tl.sum(stays, 0), max_output)
        first += BLOCK
    tl.store(count + segment, kept)


def launch_scan(candidates: Candidates, iou_threshold: float, indices: Tensor, count: Tensor) -> None:
    """Write `indices[B, max_output]`, which are filled with -1, and `count[B]`."""
    dtype = candidates.boxes.dtype
    num_boxes, max_output = candidates.order.shape[1], indices.shape[1]
    scan_boxes_kernel[(len(indices),)](
        *candidates,
        indices,
        count,
        num_boxes,
        max_output,
        threshold_bits(iou_threshold, dtype),
        BLOCK=32 if dtype == torch.float64 else 64,
        STEP=16,
        COMPUTE=triton_dtype(dtype),
        num_warps=16,  # tiles of pairs fit 123 registers then; with 8 warps they spill
        enable_fp_fusion=False,
    )
