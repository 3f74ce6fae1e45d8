"""Sorting of short segments: the place of a box is the number of boxes that come before it.

Counting takes N^2 comparisons, but on the whole device and in one launch, which also finds out which boxes take part
and gathers them in sorted order. For 5 x 1000 boxes these are 5 million comparisons, about 1 us of the device;
`torch.sort` is three launches, and gathering a fourth. A bitonic sort in one program (`tl.sort` of 1,024 keys) would be
2,250 instructions for each of 8 warps, and seconds to compile.

Keys are unique integers: the score's bits, in the order of the scores, above the inverted index. Boxes that do not
take part come last, then padding.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import ceil_div, jit, tl, triton_dtype
from fastmask.kernels.nms.gather import SortedBoxes, empty_sorted
from fastmask.kernels.nms.suppression import Candidates, load_box, store_box

MAX_RANKED = 2048  # boxes in a segment; 40 segments of that length are 20 us of comparisons, as long as a sort takes
ROWS, COLUMNS = 8, 256  # 16 rows would spill registers on sm_80 and sm_100


@jit()
def load_key(scores, valid, index, num_valid, num_boxes):
    """An int64 for each box, greater for boxes that come earlier, and whether the box takes part."""
    inside = index < num_boxes
    takes_part = index < num_valid
    if valid is not None:
        takes_part = takes_part & (tl.load(valid + index, mask=inside, other=0) != 0)
    score = tl.load(scores + index, mask=inside, other=0).to(tl.float32) + 0.0  # -0 and 0 are a tie
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, tl.where(bits < 0, ~magnitude, magnitude))  # NaN first
    high = tl.where(takes_part, bits, -0x80000000)
    return (high.to(tl.int64) << 32) | (0x7FFFFFFF - index), takes_part


@jit(do_not_specialize=["num_boxes", "num_rows", "max_output"])
def rank_boxes_kernel(
    boxes,  # [B, N, 4]
    classes,  # [B, N] or None
    scores,  # [B, N]
    valid,  # [B, N] boolean, or None: all
    counts,  # [B] integers: the first take part; or None: all
    order,  # [B, N]
    num_valid,  # [B], or None where `valid` and `counts` are
    sorted_boxes,  # [B, M, 4], or None
    sorted_classes,  # [B, M], or None
    indices,  # [B, max_output], set to -1; or None
    num_boxes,
    num_rows,  # M
    max_output,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * ROWS
    row = begin + tl.arange(0, ROWS)
    if indices is not None:
        tl.store(indices + segment * max_output + row, tl.full((ROWS,), -1, tl.int64), mask=row < max_output)
    if begin < num_rows:
        scores += segment * num_boxes
        if valid is not None:
            valid += segment * num_boxes
        limit = num_boxes
        if counts is not None:
            limit = tl.minimum(tl.load(counts + segment).to(tl.int64), num_boxes).to(tl.int32)
        key, takes_part = load_key(scores, valid, row, limit, num_boxes)
        before = tl.zeros((ROWS, COLUMNS), tl.int32)
        total = tl.zeros((COLUMNS,), tl.int32)
        for first in range(0, num_rows, COLUMNS):
            other, other_takes_part = load_key(scores, valid, first + tl.arange(0, COLUMNS), limit, num_boxes)
            before += (other[None, :] > key[:, None]).to(tl.int32)
            total += other_takes_part.to(tl.int32)
        place = tl.sum(before, 1)
        if num_valid is not None:
            tl.store(num_valid + segment, tl.sum(total, 0), mask=begin == 0)
        inside = row < num_boxes
        tl.store(order + segment * num_boxes + place, row.to(tl.int64), mask=inside)
        if sorted_boxes is not None:
            box = load_box(boxes, classes, segment * num_boxes + row, takes_part, COMPUTE)
            store_box(sorted_boxes, sorted_classes, segment * num_rows + place, box, None)


def can_rank(scores: Tensor) -> bool:
    """Short segments, with scores that fit into half a key."""
    return scores.shape[1] <= MAX_RANKED and scores.dtype != torch.float64


@lru_cache(maxsize=64)
def _prepared(dtype: torch.dtype) -> Launch:
    return Launch(rank_boxes_kernel, ROWS=ROWS, COLUMNS=COLUMNS, COMPUTE=triton_dtype(dtype))


def launch_rank(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    valid: Tensor | None,
    counts: Tensor | None,
    gathered: bool,
    indices: Tensor,
) -> tuple[Candidates, SortedBoxes | None]:
    """The order and, if `gathered`, the boxes in this order; then `indices` are set to -1."""
    (batch, num_boxes), max_output, device = scores.shape, indices.shape[1], boxes.device
    order = torch.empty(batch, num_boxes, dtype=torch.int64, device=device)
    num_valid = None
    if valid is not None or counts is not None:
        num_valid = torch.empty(batch, dtype=torch.int64, device=device)
    out = empty_sorted(boxes, classes) if gathered else None
    num_rows = out.boxes.shape[1] if out else num_boxes
    _prepared(boxes.dtype)(
        (batch, ceil_div(max(num_rows, max_output if gathered else 0), ROWS)),
        boxes,
        classes,
        scores,
        valid,
        None if counts is None else counts.contiguous(),
        order,
        num_valid,
        out.boxes if out else None,
        out.classes if out else None,
        indices if gathered else None,
        num_boxes,
        num_rows,
        max_output,
    )
    return Candidates(boxes, classes, order, num_valid), out
