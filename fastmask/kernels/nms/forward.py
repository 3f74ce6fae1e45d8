"""The Triton kernels of kernels/nms.py: its docstring has the definition, the legend and the two ways.

Every kernel reads boxes and classes through `order`, the sorted indices: to gather them first would cost
a launch each and save little, since a box is 16 bytes.
"""

from __future__ import annotations

from fastmask.kernels._runtime import divide, float_of, jit, tl


@jit()
def _load_box(boxes, classes, index, inside, dtype: tl.constexpr):
    """Corners and class. Where `inside` is False they are arbitrary."""
    box = boxes + index * 4
    x1 = tl.load(box, mask=inside).to(dtype)
    y1 = tl.load(box + 1, mask=inside).to(dtype)
    x2 = tl.load(box + 2, mask=inside).to(dtype)
    y2 = tl.load(box + 3, mask=inside).to(dtype)
    return x1, y1, x2, y2, index * 0 if classes is None else tl.load(classes + index, mask=inside)


@jit()
def _suppresses(a, b, threshold):
    """IoU(a, b) > threshold and classes agree; a comparison with NaN is False."""
    width = tl.maximum(tl.minimum(a[2], b[2]) - tl.maximum(a[0], b[0]), 0.0)
    height = tl.maximum(tl.minimum(a[3], b[3]) - tl.maximum(a[1], b[1]), 0.0)
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return (divide(intersection, union) > threshold) & (a[4] == b[4])


@jit()
def _suppresses_pairs(a, b, threshold):
    row = (a[0][:, None], a[1][:, None], a[2][:, None], a[3][:, None], a[4][:, None])
    column = (b[0][None, :], b[1][None, :], b[2][None, :], b[3][None, :], b[4][None, :])
    return _suppresses(row, column, threshold)


@jit()
def _suppressed_by_kept(
    box,
    boxes,
    classes,
    kept,
    begin,
    end,
    threshold,
    rows: tl.constexpr,
    step: tl.constexpr,
    dtype: tl.constexpr,
):
    """Which of rows boxes are suppressed by those of index `kept[begin:end]`, step of them at a time."""
    hit = tl.zeros((rows, step), tl.int1)  # reduced once, after the loop
    for first in range(begin, end, step):
        position = first + tl.arange(0, step)
        index = tl.load(kept + position, mask=position < end, other=0)
        other = _load_box(boxes, classes, index, position < end, dtype)
        hit |= _suppresses_pairs(box, other, threshold) & (position < end)[None, :]
    return tl.max(hit.to(tl.int32), 1) != 0


@jit(do_not_specialize=["num_boxes", "max_output", "threshold_bits"])
def scan_boxes_kernel(
    boxes,  # [B, N, 4]
    classes,  # [B, N] or None
    order,  # [B, N] by falling score
    considered,  # [B] how many of `order` take part
    indices,  # [B, max_output], filled with -1
    count,  # [B]
    num_boxes,
    max_output,
    threshold_bits,
    block: tl.constexpr,
    step: tl.constexpr,
    dtype: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    boxes += segment * num_boxes * 4
    order += segment * num_boxes
    indices += segment * max_output
    if classes is not None:
        classes += segment * num_boxes
    threshold = float_of(threshold_bits, dtype)
    last = tl.load(considered + segment).to(tl.int32)
    lane = tl.arange(0, block)
    first = 0
    kept = 0
    while (first < last) & (kept < max_output):
        inside = first + lane < last
        index = tl.load(order + first + lane, mask=inside, other=0)
        box = _load_box(boxes, classes, index, inside, dtype)
        gone = _suppressed_by_kept(box, boxes, classes, indices, 0, kept, threshold, block, step, dtype)
        candidate = (inside & ~gone).to(tl.int32)
        hit = (_suppresses_pairs(box, box, threshold) & (lane[:, None] < lane[None, :])).to(tl.int32)
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
        first += block
    tl.store(count + segment, kept)


@jit(do_not_specialize=["num_boxes", "first", "max_output", "threshold_bits"])
def suppression_bits_kernel(
    boxes,
    classes,
    order,
    considered,
    count,  # [B] kept in earlier chunks, unwritten before the first
    bits,  # [B, 64 * words, words] int64: bit j of word w in row i: i suppresses 64 * w + j
    num_boxes,
    first,  # of the chunk, among the sorted boxes
    max_output,
    threshold_bits,
    words: tl.constexpr,
    rows: tl.constexpr,
    dtype: tl.constexpr,
):
    # One row per thread and a loop over columns: words fill in registers, without shuffles.
    segment = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * rows + tl.arange(0, rows)
    word = tl.program_id(2)
    last = tl.load(considered + segment).to(tl.int32) - first
    kept = 0
    if first > 0:
        kept = tl.load(count + segment).to(tl.int32)
    if (word * 64 + 64 > tl.program_id(1) * rows) & (word * 64 < last) & (kept < max_output):
        boxes += segment * num_boxes * 4
        order += segment * num_boxes + first
        if classes is not None:
            classes += segment * num_boxes
        threshold = float_of(threshold_bits, dtype)
        inside = row < last
        box = _load_box(boxes, classes, tl.load(order + row, mask=inside, other=0), inside, dtype)
        suppressed = tl.zeros((rows,), tl.int64)
        for j in range(tl.minimum(64, last - word * 64)):
            column = word * 64 + j
            other = _load_box(boxes, classes, tl.load(order + column), None, dtype)
            hit = _suppresses(box, other, threshold) & (column > row)
            suppressed |= hit.to(tl.int64) << j
        tl.store(bits + (segment * (words * 64) + row) * words + word, suppressed, mask=inside)


@jit()
def _or(a, b):
    return a | b


@jit(do_not_specialize=["num_boxes", "first", "max_output"])
def scan_bits_kernel(
    bits,
    removed,  # [B, N] uint8: suppressed by an earlier chunk
    order,
    considered,
    indices,
    before,  # [B] kept before this chunk
    count,  # [B] kept after it
    num_boxes,
    first,
    max_output,
    words: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    bits += segment * (words * 64 * words)
    order += segment * num_boxes + first
    removed += segment * num_boxes + first
    indices += segment * max_output
    last = tl.minimum(tl.load(considered + segment).to(tl.int32) - first, words * 64)
    lane = tl.arange(0, 64)
    bit = lane.to(tl.int64)
    word = tl.arange(0, words)
    gone = tl.zeros((words,), tl.int64)
    kept = 0
    if first > 0:
        kept = tl.load(count + segment).to(tl.int32)
    tl.store(before + segment, kept)
    block = 0
    while (block * 64 < last) & (kept < max_output):
        row = block * 64 + lane
        inside = row < last
        diagonal = tl.load(bits + row * words + block, mask=inside, other=0)
        candidate = inside
        if first > 0:
            candidate = inside & (tl.load(removed + row, mask=inside, other=1) == 0)
        candidates = tl.sum(candidate.to(tl.int64) << bit, 0) & ~tl.sum(tl.where(word == block, gone, 0), 0)
        stays = candidates
        previous = ~candidates
        while stays != previous:
            previous = stays
            stays = candidates & ~tl.reduce(tl.where((stays >> bit) & 1 != 0, diagonal, 0), 0, _or)
        on = (stays >> bit) & 1
        place = kept + tl.cumsum(on.to(tl.int32), 0) - 1
        index = tl.load(order + row, mask=inside, other=0)
        tl.store(indices + place, index, mask=(on != 0) & (place < max_output))
        later = (on != 0)[:, None] & (word > block)[None, :]
        gone |= tl.reduce(tl.load(bits + row[:, None] * words + word[None, :], mask=later, other=0), 0, _or)
        kept = tl.minimum(kept + tl.sum(on.to(tl.int32), 0), max_output)
        block += 1
    tl.store(count + segment, kept)


@jit(do_not_specialize=["num_boxes", "first", "blocks", "max_output", "threshold_bits"])
def suppress_later_kernel(
    boxes,
    classes,
    order,
    considered,
    indices,
    before,
    count,
    removed,
    num_boxes,
    first,  # of the next chunk
    blocks,  # of rows boxes, in a segment from `first` on
    max_output,
    threshold_bits,
    rows: tl.constexpr,
    step: tl.constexpr,
    dtype: tl.constexpr,
):
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    row = first + tl.program_id(0) % blocks * rows + tl.arange(0, rows)
    begin = tl.load(before + segment).to(tl.int32)
    end = tl.load(count + segment).to(tl.int32)
    inside = row < tl.load(considered + segment).to(tl.int32)
    removed += segment * num_boxes + row
    inside = inside & (tl.load(removed, mask=inside, other=1) == 0)
    if (begin < end) & (end < max_output) & (tl.max(inside.to(tl.int32), 0) != 0):
        boxes += segment * num_boxes * 4
        indices += segment * max_output
        if classes is not None:
            classes += segment * num_boxes
        index = tl.load(order + segment * num_boxes + row, mask=inside, other=0)
        box = _load_box(boxes, classes, index, inside, dtype)
        threshold = float_of(threshold_bits, dtype)
        hit = _suppressed_by_kept(box, boxes, classes, indices, begin, end, threshold, rows, step, dtype)
        tl.store(removed, hit.to(tl.uint8), mask=inside)
