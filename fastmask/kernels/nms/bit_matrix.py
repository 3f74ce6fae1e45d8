"""NMS with a large output: the sorted boxes are processed in chunks, each with a bit matrix of its suppressions.

For each chunk, three launches:

1. `suppression_bits_kernel` computes the bits "row suppresses column" of the chunk, on the whole device.
2. `scan_bits_kernel` resolves them, one program per segment.
3. `suppress_later_kernel` tests the boxes of later chunks against those that the chunk kept, except
   after the last chunk.

Up to `MAX_CHUNK_ROWS` boxes these are two launches. Beyond, the bits of 200,000 boxes take 2 MB, where those of an
N x N matrix would take 5 GB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.kernels._runtime import ceil_div, float_of, jit, next_power_of_2, tl, triton_dtype
from fastmask.kernels.nms.suppression import (
    Candidates,
    load_box,
    suppressed_by_kept,
    suppresses,
    threshold_bits,
)

MAX_CHUNK_ROWS = 4096  # a power of two, >= 64
MAX_BITMATRIX_BYTES = 1 << 28  # of all segments together; beyond, chunks shrink


@jit(do_not_specialize=["num_boxes", "max_output", "first", "threshold_bits"])
def suppression_bits_kernel(
    boxes,  # [B, N, 4]
    classes,  # [B, N] or None
    order,  # [B, N] by falling score
    num_valid,  # [B] length of the prefix of `order` that takes part
    count,  # [B] kept in earlier chunks, unwritten before the first
    bits,  # [B, 64 * WORDS, WORDS] int64: bit j of word w in row i: i suppresses 64 * w + j
    num_boxes,
    max_output,
    first,  # position of the chunk among the sorted boxes
    threshold_bits,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    # One row per thread and a loop over columns: words fill in registers, without shuffles.
    segment = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(2)
    last = tl.load(num_valid + segment).to(tl.int32) - first
    kept = 0
    if first > 0:
        kept = tl.load(count + segment).to(tl.int32)
    if (word * 64 + 64 > tl.program_id(1) * ROWS) & (word * 64 < last) & (kept < max_output):
        boxes += segment * num_boxes * 4
        order += segment * num_boxes + first
        if classes is not None:
            classes += segment * num_boxes
        threshold = float_of(threshold_bits, COMPUTE)
        inside = row < last
        box = load_box(boxes, classes, tl.load(order + row, mask=inside, other=0), inside, COMPUTE)
        suppressed = tl.zeros((ROWS,), tl.int64)
        for j in range(tl.minimum(64, last - word * 64)):
            column = word * 64 + j
            other = load_box(boxes, classes, tl.load(order + column), None, COMPUTE)
            hit = suppresses(box, other, threshold) & (column > row)
            suppressed |= hit.to(tl.int64) << j
        tl.store(bits + (segment * (WORDS * 64) + row) * WORDS + word, suppressed, mask=inside)


@jit()
def _or(a, b):
    return a | b


@jit(do_not_specialize=["num_boxes", "max_output", "first"])
def scan_bits_kernel(
    bits,  # [B, 64 * WORDS, WORDS]
    removed,  # [B, N] uint8: suppressed by an earlier chunk
    order,  # [B, N]
    num_valid,  # [B]
    indices,  # [B, max_output]
    count_before,  # [B] kept before this chunk
    count,  # [B] kept after it
    num_boxes,
    max_output,
    first,
    WORDS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    bits += segment * (WORDS * 64 * WORDS)
    order += segment * num_boxes + first
    removed += segment * num_boxes + first
    indices += segment * max_output
    last = tl.minimum(tl.load(num_valid + segment).to(tl.int32) - first, WORDS * 64)
    lane = tl.arange(0, 64)
    bit = lane.to(tl.int64)
    word = tl.arange(0, WORDS)
    suppressed = tl.zeros((WORDS,), tl.int64)
    kept = 0
    if first > 0:
        kept = tl.load(count + segment).to(tl.int32)
    tl.store(count_before + segment, kept)
    block = 0
    while (block * 64 < last) & (kept < max_output):
        row = block * 64 + lane
        inside = row < last
        diagonal = tl.load(bits + row * WORDS + block, mask=inside, other=0)
        candidate = inside
        if first > 0:
            candidate = inside & (tl.load(removed + row, mask=inside, other=1) == 0)
        candidates = tl.sum(candidate.to(tl.int64) << bit, 0) & ~tl.sum(tl.where(word == block, suppressed, 0), 0)
        stays = candidates
        previous = ~candidates
        while stays != previous:
            previous = stays
            stays = candidates & ~tl.reduce(tl.where((stays >> bit) & 1 != 0, diagonal, 0), 0, _or)
        lane_stays = (stays >> bit) & 1
        place = kept + tl.cumsum(lane_stays.to(tl.int32), 0) - 1
        index = tl.load(order + row, mask=inside, other=0)
        tl.store(indices + place, index, mask=(lane_stays != 0) & (place < max_output))
        later = (lane_stays != 0)[:, None] & (word > block)[None, :]
        suppressed |= tl.reduce(tl.load(bits + row[:, None] * WORDS + word[None, :], mask=later, other=0), 0, _or)
        kept = tl.minimum(kept + tl.sum(lane_stays.to(tl.int32), 0), max_output)
        block += 1
    tl.store(count + segment, kept)


@jit(do_not_specialize=["num_boxes", "max_output", "blocks", "first", "threshold_bits"])
def suppress_later_kernel(
    boxes,  # [B, N, 4]
    classes,  # [B, N] or None
    order,  # [B, N]
    num_valid,  # [B]
    indices,  # [B, max_output]
    count_before,  # [B]
    count,  # [B]
    removed,  # [B, N] uint8, set here
    num_boxes,
    max_output,
    blocks,  # of ROWS boxes, in a segment from `first` on
    first,  # position of the next chunk
    threshold_bits,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    row = first + tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    begin = tl.load(count_before + segment).to(tl.int32)
    end = tl.load(count + segment).to(tl.int32)
    inside = row < tl.load(num_valid + segment).to(tl.int32)
    removed += segment * num_boxes + row
    inside = inside & (tl.load(removed, mask=inside, other=1) == 0)
    if (begin < end) & (end < max_output) & (tl.max(inside.to(tl.int32), 0) != 0):
        boxes += segment * num_boxes * 4
        indices += segment * max_output
        if classes is not None:
            classes += segment * num_boxes
        index = tl.load(order + segment * num_boxes + row, mask=inside, other=0)
        box = load_box(boxes, classes, index, inside, COMPUTE)
        threshold = float_of(threshold_bits, COMPUTE)
        hit = suppressed_by_kept(box, boxes, classes, indices, begin, end, threshold, ROWS, STEP, COMPUTE)
        tl.store(removed, hit.to(tl.uint8), mask=inside)


def _chunk_rows(batch: int, num_boxes: int) -> int:
    """Boxes in a chunk: a power of two in [64, MAX_CHUNK_ROWS]."""
    rows = min(MAX_CHUNK_ROWS, max(64, next_power_of_2(num_boxes)))
    while rows > 512 and batch * rows * rows // 8 > MAX_BITMATRIX_BYTES:
        rows //= 2
    return rows


def launch_bit_matrix(candidates: Candidates, iou_threshold: float, indices: Tensor, count: Tensor) -> None:
    """Write `indices[B, max_output]`, which are filled with -1, and `count[B]`."""
    (batch, num_boxes), max_output = candidates.order.shape, indices.shape[1]
    dtype, device = candidates.boxes.dtype, indices.device
    bits_of_threshold = threshold_bits(iou_threshold, dtype)
    arithmetic = {"COMPUTE": triton_dtype(dtype), "enable_fp_fusion": False}
    chunk = _chunk_rows(batch, num_boxes)
    rows, words = min(128, chunk), chunk // 64

    bits = torch.empty(batch, chunk, words, dtype=torch.int64, device=device)
    removed = torch.zeros(batch, num_boxes if num_boxes > chunk else 0, dtype=torch.uint8, device=device)
    count_before = torch.empty_like(count)
    for first in range(0, num_boxes, chunk):
        size = min(chunk, num_boxes - first)
        suppression_bits_kernel[(batch, ceil_div(size, rows), ceil_div(size, 64))](
            *candidates,
            count,
            bits,
            num_boxes,
            max_output,
            first,
            bits_of_threshold,
            WORDS=words,
            ROWS=rows,
            **arithmetic,
        )
        scan_bits_kernel[(batch,)](
            bits,
            removed,
            candidates.order,
            candidates.num_valid,
            indices,
            count_before,
            count,
            num_boxes,
            max_output,
            first,
            WORDS=words,
            num_warps=8 if words > 8 else 4,
        )
        following = first + chunk
        if following < num_boxes:
            blocks = ceil_div(num_boxes - following, 64)
            suppress_later_kernel[(batch * blocks,)](
                *candidates,
                indices,
                count_before,
                count,
                removed,
                num_boxes,
                max_output,
                blocks,
                following,
                bits_of_threshold,
                ROWS=64,  # 40 registers, against 103 with 16 columns a step
                STEP=4,
                **arithmetic,
            )
