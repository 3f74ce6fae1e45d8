"""Masks as bits: 32 rows of a column of the image in a word, for the words that the box touches.

A warp computes words of neighbouring columns row by row. A row's position in the mask is the same for all of them: it
costs once for 32 pixels, and the mask's rows, interpolated along x, stay in registers until the next one is reached.
Arithmetic is that of `paste_masks`, operation by operation.
"""

from __future__ import annotations

from fastmask.kernels._mask_sampling import mask_coordinate, mask_scale, reached_axis
from fastmask.kernels._runtime import float_of, jit, tl


@jit()
def _interpolated_row(mask, row, c, du, M: tl.constexpr, COMPUTE: tl.constexpr):
    """A row of the mask at columns c + du."""
    left = tl.load(mask + row * M + c, mask=(c >= 0) & (c < M), other=0.0).to(COMPUTE)
    right = tl.load(mask + row * M + c + 1, mask=c < M - 1, other=0.0).to(COMPUTE)
    return tl.fma(du, right - left, left)


@jit()
def _store_region(regions, n, left, columns, first_word, words_per_column):
    region = regions + n * 4
    tl.store(region, left)
    tl.store(region + 1, columns)
    tl.store(region + 2, first_word)
    tl.store(region + 3, words_per_column)


@jit(do_not_specialize=["num_masks", "programs_per_mask", "height", "width", "threshold_bits"])
def pack_masks_kernel(
    masks,  # [B * N, m, m]
    boxes,  # [B * N, 4], float32 or float64
    counts,  # [B] or None: all N
    words,  # [B * N, W * ceil(H / 32)] int32: those of the region, column by column
    regions,  # [B * N, 4] int32: first column, columns (-1: no string), first word of a column, words of a column
    num_masks,
    programs_per_mask,
    height,
    width,
    threshold_bits,
    M: tl.constexpr,
    PADDING: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    program = tl.program_id(0)
    n = program // programs_per_mask
    tile = program - n * programs_per_mask
    counted = n >= 0
    if counts is not None:
        image = n // num_masks
        counted = n - image * num_masks < tl.load(counts + image)
    n = n.to(tl.int64)
    box = boxes + n * 4
    x1, y1, x2, y2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    x1, x2, left, right = reached_axis(x1, x2, width.to(x1.dtype), M, PADDING)
    y1, y2, top, bottom = reached_axis(y1, y2, height.to(y1.dtype), M, PADDING)
    columns = tl.where(counted, tl.where(top < bottom, tl.maximum(right - left, 0), 0), -1)
    first_word = top // 32
    words_per_column = (bottom + 31) // 32 - first_word
    if tile == 0:
        _store_region(regions, n, left, columns, first_word, words_per_column)

    across = (columns + COLUMNS - 1) // COLUMNS
    tiles = across * words_per_column
    if tile < tiles:
        x_start, x_scale = x1.to(COMPUTE), mask_scale(x1, x2, M, PADDING, COMPUTE)
        y_start, y_scale = y1.to(COMPUTE), mask_scale(y1, y2, M, PADDING, COMPUTE)
        threshold = float_of(threshold_bits, COMPUTE)
        unreached = (threshold <= 0).to(tl.int32)
        mask = masks + n * (M * M)
        words += n * (width * ((height + 31) // 32))
        while tile < tiles:
            word = tile // across
            column = (tile - word * across) * COLUMNS + tl.arange(0, COLUMNS)
            c, du = mask_coordinate(left + column, x_start, x_scale, M, PADDING)
            first_row = (first_word + word) * 32
            bits = tl.zeros((COLUMNS,), tl.int32)
            y = tl.maximum(top, first_row)
            last_row = tl.minimum(bottom, first_row + 32)
            r, dv = mask_coordinate(y, y_start, y_scale, M, PADDING)
            while y < last_row:
                mask_row = r
                upper = _interpolated_row(mask, tl.minimum(tl.maximum(r, 0), M - 1), c, du, M, COMPUTE)
                lower = _interpolated_row(mask, tl.minimum(r + 1, M - 1), c, du, M, COMPUTE)
                while (r == mask_row) & (y < last_row):
                    upper_weight = tl.where((r >= 0) & (r < M), 1 - dv, 0.0)
                    lower_weight = tl.where(r < M - 1, dv, 0.0)
                    value = tl.fma(lower_weight, lower, upper_weight * upper)
                    bits |= ((value >= threshold).to(tl.int32) ^ unreached) << (y - first_row)
                    y += 1
                    r, dv = mask_coordinate(y, y_start, y_scale, M, PADDING)
            tl.store(words + column * words_per_column + word, bits, mask=column < columns)
            tile += programs_per_mask


@jit(do_not_specialize=["height", "width"])
def pack_bitmaps_kernel(
    bitmaps,  # [N, H, W] uint8
    words,  # [N, W * ceil(H / 32)] int32
    regions,  # [N, 4] int32
    height,
    width,
    BOOLEAN: tl.constexpr,  # bytes are 0 or 1
    COLUMNS: tl.constexpr,
):
    words_per_column = (height + 31) // 32
    across = (width + COLUMNS - 1) // COLUMNS
    tiles = tl.maximum(across * words_per_column, 1)
    n = tl.program_id(0) // tiles
    tile = tl.program_id(0) - n * tiles
    n = n.to(tl.int64)
    if tile == 0:
        _store_region(regions, n, 0, width, 0, words_per_column)
    word = tile // tl.maximum(across, 1)
    column = (tile - word * across) * COLUMNS + tl.arange(0, COLUMNS)
    pixel = bitmaps + n * (height * width) + word * 32 * width + column
    rows = tl.where(column < width, height - word * 32, 0)
    bits = tl.zeros((COLUMNS,), tl.int32)
    for i in tl.static_range(32):
        value = tl.load(pixel, mask=rows > i, other=0)
        bits |= (value if BOOLEAN else value != 0).to(tl.int32) << i
        pixel += width
    words += n * (width * words_per_column)
    tl.store(words + column * words_per_column + word, bits, mask=(column < width) & (height > 0))
