"""The second half of NMS by a bit matrix: one program per segment resolves a chunk's bits, 64 boxes after the other.

A block of 64 is two columns of words. A column's bits of all earlier rows that stay, ORed, are the boxes that are out;
the block's own rows then decide about the rest. The loads of a column do not depend on what stays, so those of the next
block are issued before this one is resolved, and what stays is held in registers.

The chain of dependent steps is the cost. One warp holds 1,024 rows, so that it needs neither barriers nor shared
memory: a block is 320 instructions on sm_90, 800 cycles by the static model, of which a round of `_resolve` is 60 (RPN
proposals take 1.2 rounds). More rows have a warp for each 512. Blocks of 32 boxes would be bound by the latency of
their loads. Not yet measured on a GPU.
"""

from __future__ import annotations

from fastmask.kernels._bits import popcount
from fastmask.kernels._runtime import jit, tl
from fastmask.kernels.nms.suppression import load_box, store_box


@jit()
def _or(a, b):
    return a | b


@jit()
def _suppressed_by(stays, rows, lane):
    """The columns that some row suppresses of which `stays` has the bit."""
    return tl.reduce(tl.where((stays >> lane) & 1 != 0, rows, 0), 0, _or)


@jit()
def _resolve(suppressed, rows, lane):
    """The bits of the boxes that stay, of 32: the fixed point of "not suppressed by a box that stays"."""
    stays = ~suppressed
    previous = suppressed
    while stays != previous:
        previous = stays
        stays = ~(suppressed | _suppressed_by(stays, rows, lane))
    return stays


@jit()
def _load_columns(bits, removed, order, row, lane, begin, last, WORD: tl.constexpr, CHUNK: tl.constexpr):
    """The WORD-th column of a block: bits of earlier rows, what is out, bits of the first 32 rows, and indices."""
    position = WORD * 32 + lane
    inside = begin + position < last
    column = bits + WORD * CHUNK
    earlier = tl.load(column + row, mask=(row < begin) & (begin + WORD * 32 < last), other=0)
    out = (~inside).to(tl.int32)
    if removed is not None:
        out = tl.load(removed + position, mask=inside, other=1).to(tl.int32)
    first = tl.load(column + begin + lane, mask=begin + WORD * 32 < last, other=0)
    return earlier, out << lane, first, tl.load(order + position, mask=inside, other=0)


@jit()
def _store_kept(
    stays,
    kept,
    index,
    indices,
    max_output,
    boxes,
    classes,
    kept_boxes,
    kept_classes,
    lane,
):
    """Append the indices, and the boxes, that have a bit in `stays`. Returns how many there are now."""
    lane_stays = (stays >> lane) & 1 != 0
    place = kept + popcount(stays & ((1 << lane) - 1))
    tl.store(indices + place, index, mask=lane_stays & (place < max_output))
    if kept_boxes is not None:
        box = load_box(boxes, classes, lane, lane_stays, boxes.dtype.element_ty)
        store_box(kept_boxes, kept_classes, place, box, lane_stays)
    return kept + popcount(stays)


@jit(do_not_specialize=["num_boxes", "num_rows", "max_output", "first"])
def scan_bits_kernel(
    boxes,  # [B, M, 4] sorted
    classes,  # [B, M] or None
    order,  # [B, N]
    num_valid,  # [B] or None: all N
    bits,  # [B, CHUNK / 32, CHUNK]
    removed,  # [B, M] uint8: suppressed by an earlier chunk; None if there is one chunk
    indices,  # [B, max_output]
    before,  # [B] kept in earlier chunks, or None: this is the first
    count,  # [B] and in this one
    kept_boxes,  # [B, CHUNK, 4] kept in this chunk; None after the last chunk
    kept_classes,  # [B, CHUNK] or None
    num_boxes,
    num_rows,  # M
    max_output,
    first,
    CHUNK: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    bits += segment * (CHUNK // 32 * CHUNK)
    last = num_boxes if num_valid is None else tl.load(num_valid + segment).to(tl.int32)
    last = tl.minimum(last - first, CHUNK)
    kept = 0 if before is None else tl.load(before + segment).to(tl.int32)
    last = tl.where(kept < max_output, last, 0)  # otherwise the bits are not written
    lane = tl.arange(0, 32)
    start = tl.arange(0, CHUNK // 32)[:, None] * 32
    row = start + lane[None, :]
    keep = tl.load(bits + row, mask=row >= last + CHUNK, other=0)  # -1 if kept; 0, in the layout of the loads below

    # Pointers advance with the block: offsets computed from its number would make every comparison 64 bits wide.
    order += segment * num_boxes + first
    indices += segment * max_output
    if removed is not None:
        removed += segment * num_rows + first
    if kept_boxes is not None:
        boxes += (segment * num_rows + first) * 4
        kept_boxes += (segment * CHUNK - kept) * 4
        if classes is not None:
            classes += segment * num_rows + first
            kept_classes += segment * CHUNK - kept
    begin = 0
    # Of each column: bits of earlier rows, what is out, bits of the block's first 32 rows, indices.
    a0, a1, a2, a3 = _load_columns(bits, removed, order, row, lane, 0, last, 0, CHUNK)
    b0, b1, b2, b3 = _load_columns(bits, removed, order, row, lane, 0, last, 1, CHUNK)
    corner = tl.load(bits + CHUNK + 32 + lane, mask=last > 32, other=0)
    while (begin < last) & (kept < max_output):
        low = tl.reduce(a0 & keep, None, _or) | tl.reduce(a1, 0, _or)
        high = tl.reduce(b0 & keep, None, _or) | tl.reduce(b1, 0, _or)
        rows_low, rows_across, rows_high, index_low, index_high = a2, b2, corner, a3, b3
        this = begin
        begin += 64
        bits += 2 * CHUNK
        order += 64
        if removed is not None:
            removed += 64
        a0, a1, a2, a3 = _load_columns(bits, removed, order, row, lane, begin, last, 0, CHUNK)
        b0, b1, b2, b3 = _load_columns(bits, removed, order, row, lane, begin, last, 1, CHUNK)
        corner = tl.load(bits + CHUNK + begin + 32 + lane, mask=begin + 32 < last, other=0)

        low = _resolve(low, rows_low, lane)
        high = _resolve(high | _suppressed_by(low, rows_across, lane), rows_high, lane)
        stays = tl.where(start % 64 == 0, (low >> lane)[None, :], (high >> lane)[None, :]) & 1
        keep = tl.where(start // 64 * 64 == this, -stays, keep)
        kept = _store_kept(low, kept, index_low, indices, max_output, boxes, classes, kept_boxes, kept_classes, lane)
        if kept_boxes is not None:
            boxes += 32 * 4
            if classes is not None:
                classes += 32
        kept = _store_kept(high, kept, index_high, indices, max_output, boxes, classes, kept_boxes, kept_classes, lane)
        if kept_boxes is not None:
            boxes += 32 * 4
            if classes is not None:
                classes += 32
    tl.store(count + segment, tl.minimum(kept, max_output))
