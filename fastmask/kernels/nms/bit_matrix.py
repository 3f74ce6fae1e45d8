"""NMS with a large output: the sorted boxes are processed in chunks, each with a bit matrix of its suppressions.

Kernels read boxes in sorted order, gathered by `rank.py` or `gather.py`. For each chunk there are three launches:

1. `suppression_bits_kernel` computes the bits "row suppresses column" of the chunk, on the whole device.
2. `scan_bits_kernel` (`scan_bits.py`) resolves them, one program per segment.
3. `suppress_later_kernel` tests the boxes of later chunks against those that the chunk kept, except
   after the last chunk.

Up to `MAX_CHUNK_ROWS` boxes these are two launches. Beyond, the bits of 200,000 boxes take 2 MB, where those of an
N x N matrix would take 5 GB.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import ceil_div, jit, next_power_of_2, tl, triton_dtype
from fastmask.kernels.nms.gather import ROWS, SortedBoxes, launch_gather
from fastmask.kernels.nms.scan_bits import scan_bits_kernel
from fastmask.kernels.nms.suppression import (
    Candidates,
    load_box,
    load_threshold,
    needs_division,
    suppressed_by_kept,
    suppresses,
    threshold_bits,
)

MAX_CHUNK_ROWS = 4096  # a power of two, >= 64
LATER_ROWS = 64  # boxes of later chunks that a program tests
MAX_BITMATRIX_BYTES = 1 << 28  # of all segments together; beyond, chunks shrink


@jit(do_not_specialize=["num_boxes", "num_rows", "max_output", "first", "threshold_bits"])
def suppression_bits_kernel(
    boxes,  # [B, M, 4] sorted
    classes,  # [B, M] or None
    num_valid,  # [B] or None: all N
    before,  # [B] kept in earlier chunks, or None: this is the first
    bits,  # [B, CHUNK / 32, CHUNK] int32: bit j of row i in word w: i suppresses 32 * w + j
    num_boxes,
    num_rows,  # M
    max_output,
    first,  # position of the chunk among the sorted boxes
    threshold_bits,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    # One row per thread and a loop over columns: words fill in registers, without shuffles.
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * ROWS
    word = tl.program_id(2)
    last = (num_boxes if num_valid is None else tl.load(num_valid + segment).to(tl.int32)) - first
    kept = 0 if before is None else tl.load(before + segment).to(tl.int32)
    if (word * 32 + 31 > begin) & (begin < last) & (word * 32 < last) & (kept < max_output):
        boxes += (segment * num_rows + first) * 4
        if classes is not None:
            classes += segment * num_rows + first
        threshold = load_threshold(threshold_bits, COMPUTE)
        row = begin + tl.arange(0, ROWS)
        box = load_box(boxes, classes, row, None, COMPUTE)
        suppressed = tl.zeros((ROWS,), tl.int32)
        for j in range(0, 32, STEP):
            some = tl.zeros((ROWS,), tl.int32)
            for k in tl.static_range(STEP):  # without branches: the loads of all columns are issued first
                other = load_box(boxes, classes, word * 32 + j + k, None, COMPUTE)
                some |= suppresses(box, other, threshold, DIVIDE).to(tl.int32) << k
            suppressed |= some << j
        earlier = row - word * 32  # columns up to the row itself: a box suppresses later ones only
        later = tl.where(earlier < 0, -1, tl.where(earlier < 31, -2 << earlier, 0))
        tl.store(bits + (segment * (CHUNK // 32) + word) * CHUNK + row, suppressed & later)


@jit(do_not_specialize=["num_boxes", "num_rows", "max_output", "blocks", "first", "threshold_bits"])
def suppress_later_kernel(
    boxes,  # [B, M, 4] sorted
    classes,  # [B, M] or None
    num_valid,  # [B] or None: all N
    before,  # [B] kept in earlier chunks, or None
    count,  # [B] and in the last one
    kept_boxes,  # [B, CHUNK, 4] of the last chunk
    kept_classes,  # [B, CHUNK] or None
    removed,  # [B, M] uint8, set here
    num_boxes,
    num_rows,  # M
    max_output,
    blocks,  # of ROWS boxes, in a segment from `first` on
    first,  # position of the next chunk
    threshold_bits,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    row = first + tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = row < (num_boxes if num_valid is None else tl.load(num_valid + segment).to(tl.int32))
    removed += segment * num_rows + row
    inside = inside & (tl.load(removed, mask=inside, other=1) == 0)
    kept = tl.load(count + segment).to(tl.int32)
    if (kept < max_output) & (tl.max(inside.to(tl.int32), 0) != 0):
        box = load_box(boxes, classes, segment * num_rows + row, inside, COMPUTE)
        kept_boxes += segment * CHUNK * 4
        if classes is not None:
            kept_classes += segment * CHUNK
        size = kept if before is None else kept - tl.load(before + segment).to(tl.int32)
        threshold = load_threshold(threshold_bits, COMPUTE)
        hit = suppressed_by_kept(box, kept_boxes, kept_classes, size, threshold, ROWS, STEP, COMPUTE, DIVIDE)
        tl.store(removed, hit.to(tl.uint8), mask=inside)


def _chunk_rows(batch: int, num_boxes: int) -> int:
    """Boxes in a chunk: a power of two in [64, MAX_CHUNK_ROWS]."""
    rows = min(MAX_CHUNK_ROWS, max(64, next_power_of_2(num_boxes)))
    while rows > 512 and batch * rows * rows // 8 > MAX_BITMATRIX_BYTES:
        rows //= 2
    return rows


class _Launches(NamedTuple):
    """The launches for a chunk; `rows` are those of a program of the first."""

    find_suppressions: Launch
    scan: Launch
    suppress_later: Launch
    rows: int


@lru_cache(maxsize=64)
def _prepared(dtype: torch.dtype, divide: bool, chunk: int) -> _Launches:
    rows = min(128, chunk)
    arithmetic = {"COMPUTE": triton_dtype(dtype), "DIVIDE": divide, "enable_fp_fusion": False}
    return _Launches(
        Launch(
            suppression_bits_kernel,
            CHUNK=chunk,
            ROWS=rows,
            STEP=8,  # 208 instructions for 8 columns and 48 registers; a division would be 56 for each column
            num_warps=rows // 32,
            **arithmetic,
        ),
        Launch(
            scan_bits_kernel,
            CHUNK=chunk,
            num_warps=1 if chunk <= 1024 else chunk // 512,  # see `scan_bits.py`
        ),
        Launch(suppress_later_kernel, CHUNK=chunk, ROWS=LATER_ROWS, STEP=4, **arithmetic),
        rows,
    )


def launch_bit_matrix(
    candidates: Candidates, gathered: SortedBoxes | None, iou_threshold: float, indices: Tensor, count: Tensor
) -> None:
    """Write `indices[B, max_output]` and `count[B]`; if there are `gathered` boxes, the indices are -1 already."""
    (batch, num_boxes), max_output = candidates.order.shape, indices.shape[1]
    dtype, device, num_valid = candidates.boxes.dtype, indices.device, candidates.num_valid
    bits_of_threshold = threshold_bits(iou_threshold, dtype)
    chunk = _chunk_rows(batch, num_boxes)
    launches = _prepared(dtype, needs_division(iou_threshold, dtype), chunk)

    removed = kept_boxes = kept_classes = None
    if num_boxes > chunk:
        removed = torch.zeros(batch, ceil_div(num_boxes, ROWS) * ROWS, dtype=torch.uint8, device=device)
    boxes, classes = gathered or launch_gather(candidates, indices)
    num_rows = boxes.shape[1]
    if num_boxes > chunk:
        kept_boxes = torch.empty((batch, chunk, 4), dtype=boxes.dtype, device=device)
        if classes is not None:
            kept_classes = torch.empty((batch, chunk), dtype=classes.dtype, device=device)
    bits = torch.empty((batch, chunk // 32, chunk), dtype=torch.int32, device=device)
    before = None
    for first in range(0, num_boxes, chunk):
        size = min(chunk, num_boxes - first)
        following = first + chunk
        is_last = following >= num_boxes
        kept = count if is_last else torch.empty(batch, dtype=torch.int64, device=device)
        sizes = num_boxes, num_rows, max_output
        launches.find_suppressions(
            (batch, ceil_div(size, launches.rows), ceil_div(size, 32)),
            boxes,
            classes,
            num_valid,
            before,
            bits,
            *sizes,
            first,
            bits_of_threshold,
        )
        launches.scan(
            (batch,),
            boxes,
            classes,
            candidates.order,
            num_valid,
            bits,
            removed,
            indices,
            before,
            kept,
            None if is_last else kept_boxes,
            None if is_last else kept_classes,
            *sizes,
            first,
        )
        if not is_last:
            blocks = ceil_div(num_boxes - following, LATER_ROWS)
            launches.suppress_later(
                (batch * blocks,),
                boxes,
                classes,
                num_valid,
                before,
                kept,
                kept_boxes,
                kept_classes,
                removed,
                *sizes,
                blocks,
                following,
                bits_of_threshold,
            )
        before = kept
