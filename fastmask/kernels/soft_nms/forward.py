"""The kernel of soft non-maximum suppression: one program per segment."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    divide,
    float64_bits,
    float_of,
    jit,
    next_power_of_2,
    on_device_of,
    tl,
    triton_dtype,
)
from fastmask.kernels.nms.suppression import load_box
from fastmask.kernels.soft_nms.reference import dtype_of, first_scores_of, numbers_of

if TYPE_CHECKING:
    from fastmask.kernels.soft_nms.op import SoftNMSSpec

# Boxes in a tile, at most, and of a warp: 4 for each thread. A smaller tile has fewer warps to wait for. Each of 100
# steps over 1000 boxes is about 250 instructions of 8 warps and 1,360 cycles of latency, 80 us in all by the static
# model; a sort, which longer segments need, would be 20-100. Compiled: 63 registers on sm_90, 120 for longer segments.
# Not yet measured on a GPU.
MAX_TILE = 2048
MIN_TILE = BOXES_PER_WARP = 128


@jit()
def _load_usable_box(boxes, classes, index, mask, COMPUTE: tl.constexpr):
    """Corners, class and area, all but the class 0 where the area is not finite."""
    x1, y1, x2, y2, label = load_box(boxes, classes, index, mask, COMPUTE)
    area = (x2 - x1) * (y2 - y1)
    usable = tl.abs(area) < float("inf")
    x1, y1 = tl.where(usable, x1, 0.0), tl.where(usable, y1, 0.0)
    x2, y2 = tl.where(usable, x2, 0.0), tl.where(usable, y2, 0.0)
    return x1, y1, x2, y2, label, tl.where(usable, area, 0.0)


@jit()
def _decayed(score, box, by, numbers, GAUSSIAN: tl.constexpr):
    """Scores of boxes after `by` was selected, -inf of those that are dropped."""
    width = tl.maximum(tl.minimum(box[2], by[2]) - tl.maximum(box[0], by[0]), 0.0)
    height = tl.maximum(tl.minimum(box[3], by[3]) - tl.maximum(box[1], by[1]), 0.0)
    intersection = width * height
    overlaps = (intersection > 0) & (box[4] == by[4])
    iou = tl.where(overlaps, divide(intersection, box[5] + by[5] - intersection), 0.0)
    if GAUSSIAN:
        score *= tl.exp(iou * iou * numbers[2])
    else:
        score *= 1 - tl.where(iou > numbers[0], iou, 0.0)
    return tl.where(score >= numbers[1], score, -float("inf"))


@jit()
def _best(score, index):
    """The highest score, and the lowest index of those that have it."""
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, index, 0x7FFFFFFF), 0)


@jit()
def _better(best, winner, other_best, other_winner):
    """The better of two boxes: scores and indices."""
    is_other = (other_best > best) | ((other_best == best) & (other_winner < winner))
    return tl.where(is_other, other_best, best), tl.where(is_other, other_winner, winner)


@jit(do_not_specialize=["num_boxes", "max_output", "iou_threshold", "score_threshold", "factor"])
def _soft_nms_kernel(
    boxes,  # [B, N, 4]
    classes,  # [B, N] or None
    scores,  # [B, N], sorted if there is an order; then those of boxes that do not take part are -inf
    order,  # [B, N] by falling score, or None: N <= TILE
    counts,  # [B] integers: the first take part; or None: all
    current,  # [B, N], or None: scores of the tiles after the first, as they fall
    indices,  # [B, max_output]
    selected,  # [B, max_output]
    num_boxes,
    max_output,
    iou_threshold,  # float64 bits, like the next two
    score_threshold,
    factor,
    TILE: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    boxes += segment * num_boxes * 4
    scores += segment * num_boxes
    indices += segment * max_output
    selected += segment * max_output
    if classes is not None:
        classes += segment * num_boxes
    if order is not None:
        order += segment * num_boxes
        current += segment * num_boxes
    numbers = float_of(iou_threshold, COMPUTE), float_of(score_threshold, COMPUTE), float_of(factor, COMPUTE)
    lane = tl.arange(0, TILE)
    last = num_boxes
    if counts is not None:
        last = tl.minimum(tl.load(counts + segment).to(tl.int64), num_boxes).to(tl.int32)

    valid = lane < last
    index = lane if order is None else tl.load(order + lane).to(tl.int32)
    box = _load_usable_box(boxes, classes, index, valid, COMPUTE)
    score = tl.load(scores + lane, mask=valid, other=-float("inf")).to(COMPUTE)
    score = tl.where(score >= numbers[1], score, -float("inf"))
    best, winner = _best(score, index)
    end = TILE  # of the boxes that take part so far
    kept = 0
    while (kept < max_output) & (best > -float("inf")):
        tl.store(indices + kept, winner.to(tl.int64))
        tl.store(selected + kept, best.to(selected.dtype.element_ty))
        kept += 1
        by = _load_usable_box(boxes, classes, winner, None, COMPUTE)
        score = tl.where(index == winner, -float("inf"), _decayed(score, box, by, numbers, GAUSSIAN))
        previous = winner
        best, winner = _best(score, index)
        if order is not None:
            for first in range(TILE, end, TILE):
                valid = first + lane < last
                later = tl.load(order + first + lane, mask=valid, other=0).to(tl.int32)
                later_box = _load_usable_box(boxes, classes, later, valid, COMPUTE)
                decayed = tl.load(current + first + lane, mask=valid, other=-float("inf"))
                decayed = _decayed(decayed, later_box, by, numbers, GAUSSIAN)
                decayed = tl.where(later == previous, -float("inf"), decayed)
                tl.store(current + first + lane, decayed, mask=valid)
                other_best, other_winner = _best(decayed, later)
                best, winner = _better(best, winner, other_best, other_winner)
            entering = tl.load(scores + end, mask=end < last, other=-float("inf"))
            while (entering >= best) & (entering > -float("inf")):
                tl.debug_barrier()  # reads the indices that other threads stored
                valid = end + lane < last
                later = tl.load(order + end + lane, mask=valid, other=0).to(tl.int32)
                later_box = _load_usable_box(boxes, classes, later, valid, COMPUTE)
                decayed = tl.load(scores + end + lane, mask=valid, other=-float("inf"))
                for k in range(kept):
                    earlier = _load_usable_box(boxes, classes, tl.load(indices + k), None, COMPUTE)
                    decayed = _decayed(decayed, later_box, earlier, numbers, GAUSSIAN)
                tl.store(current + end + lane, decayed, mask=valid)
                other_best, other_winner = _best(decayed, later)
                best, winner = _better(best, winner, other_best, other_winner)
                end += TILE
                entering = tl.load(scores + end, mask=end < last, other=-float("inf"))
            tl.debug_barrier()  # the next step may read scores that other threads stored
    for first in range(kept, max_output, TILE):
        tl.store(indices + first + lane, tl.full((TILE,), -1, tl.int64), mask=first + lane < max_output)
        tl.store(selected + first + lane, tl.zeros((TILE,), selected.dtype.element_ty), mask=first + lane < max_output)


@lru_cache(maxsize=1024)
def _prepared(spec: SoftNMSSpec, num_boxes: int, tile: int, dtype: torch.dtype) -> Launch:
    return Launch(
        _soft_nms_kernel,
        num_boxes,
        spec.max_output,
        *(float64_bits(number) for number in numbers_of(spec, dtype)),
        TILE=tile,
        GAUSSIAN=spec.method == "gaussian",
        COMPUTE=triton_dtype(dtype),
        num_warps=tile // BOXES_PER_WARP,
        enable_fp_fusion=False,
    )


def launch_soft_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, counts: Tensor | None, spec: SoftNMSSpec
) -> tuple[Tensor, Tensor]:
    batch, num_boxes = scores.shape
    if not batch * num_boxes * spec.max_output:
        indices = torch.full((batch, spec.max_output), -1, dtype=torch.int64, device=boxes.device)
        return indices, torch.zeros_like(indices, dtype=scores.dtype)
    indices = torch.empty((batch, spec.max_output), dtype=torch.int64, device=boxes.device)
    selected = torch.empty((batch, spec.max_output), dtype=scores.dtype, device=boxes.device)
    dtype = dtype_of(boxes, scores)
    order = current = None
    if num_boxes > MAX_TILE:
        first_scores = first_scores_of(scores.to(dtype), counts, numbers_of(spec, dtype).score_threshold)
        scores, order = first_scores.sort(dim=1, descending=True, stable=True)
        counts, current = None, torch.empty_like(scores)
    tile = min(max(next_power_of_2(num_boxes), MIN_TILE), MAX_TILE)
    with on_device_of(boxes):
        _prepared(spec, num_boxes, tile, dtype)(
            (batch,),
            boxes.contiguous(),
            None if classes is None else classes.contiguous(),
            scores.contiguous(),
            order,
            None if counts is None else counts.contiguous(),
            current,
            indices,
            selected,
        )
    return indices, selected
