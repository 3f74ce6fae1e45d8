"""Bitmaps and RLE on accelerators: one program samples 8 bins of one target.

A sample of a bitmap reads four bytes. In an RLE, a search of the ends of the runs, log2(runs) dependent reads, finds
the run of the first sample of each column of samples. The next sample below lies at most a pixel farther, and at most
two when rounded, so that its run is found with one or two reads. Nothing is decoded to memory, and bitmaps, which peers
first convert to float32, are read as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import ceil_div, divide, jit, on_device_of, tl
from fastmask.kernels.mask_targets.polygon_kernel import object_of
from fastmask.kernels.roi_align.geometry import Axis, axis_at, bins_along, finite_box, neighbours
from fastmask.masks import OBJECT_COLUMNS, RLE

if TYPE_CHECKING:
    from fastmask.kernels.mask_targets.op import MaskTargetsSpec

# By the static model, 256 RoIs of 28 x 28 take 32 us from bitmaps and 62 us from RLE on an H200; 16 bins x 4 samples
# 43 us from bitmaps, for the longest programs. Compiled: at most 72 registers on sm_80, 64 on sm_90 and sm_100, 50 on
# gfx942, no spills. Not yet measured on a GPU.
BINS = 8
SAMPLES = 8  # along x, at a time
MAX_STEPWISE = 2.0**19  # pixels from the origin: beyond, rounding may move two samples of a column farther apart


@jit()
def _in_own_pixels(start, end, scale, offset, ALIGNED: tl.constexpr):
    """A box along one axis, from the image to the pixels of its object, as `bitmaps.in_own_pixels` has it."""
    if ALIGNED:
        start, end = start - 0.5, end - 0.5
    else:
        end = start + tl.maximum(end - start, 1.0)
    start, end = start * scale + offset, end * scale + offset
    return tl.where(scale < 0, end, start), tl.where(scale < 0, start, end), scale < 0


@jit()
def _ended(ends, count, before, index):
    """1 if the run that follows `before` runs ends at `index` or before."""
    return (tl.load(ends + before, mask=before < count, other=0x7FFFFFFF) <= index).to(tl.int32)


@jit()
def _runs_before(ends, count, highest_step, left_index, right_index):
    """How many of `count` ascending ends are at most each index: odd if that pixel belongs to the object."""
    left, right = tl.zeros(left_index.shape, tl.int32), tl.zeros(right_index.shape, tl.int32)
    step = highest_step
    while step > 0:  # both in one loop, so that their reads overlap
        left += step * _ended(ends, count, left + step - 1, left_index)
        right += step * _ended(ends, count, right + step - 1, right_index)
        step //= 2
    return left, right


@jit()
def _sum_of_samples(
    data, count, row, column, height, width, stepwise, RATIO: tl.constexpr, SAMPLES: tl.constexpr, IS_RLE: tl.constexpr
):
    """The sum over the samples of each bin."""
    # The largest power of two up to `count`, from the exponent of a float, or the next one where that was rounded up.
    exponent = (tl.maximum(count, 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    highest_step = 1 << exponent
    num_rows = RATIO if RATIO > 0 else tl.max(row.visited, 0).to(tl.int32)
    num_columns = RATIO if RATIO > 0 else tl.max(column.visited, 0).to(tl.int32)
    across = Axis(
        column.start[:, None],
        column.bin,
        column.grid,
        column.skipped[:, None],
        column.visited[:, None],
        column.extent,
        column.per_grid,
    )
    sums = tl.zeros((row.start.shape[0], SAMPLES), tl.float32)
    j = 0
    while j < num_columns:
        sample = j + tl.arange(0, SAMPLES)[None, :]
        low_x, high_x, left_weight, right_weight = neighbours(across, sample, RATIO)
        left_weight = tl.where(sample < num_columns, left_weight, 0.0)
        right_weight = tl.where(sample < num_columns, right_weight, 0.0)
        if IS_RLE:
            low_x, high_x = low_x * height, high_x * height
            last_y = neighbours(row, 0, RATIO)[0][:, None]
            left, right = _runs_before(data, count, highest_step, low_x + last_y, high_x + last_y)
            left_below, right_below = left, right
        else:
            last_y, left, right, left_below, right_below = 0, 0, 0, 0, 0
        i = 0
        while i < num_rows:
            low_y, high_y, upper_weight, lower_weight = neighbours(row, i, RATIO)
            low_y, high_y = low_y[:, None], high_y[:, None]
            if IS_RLE:
                if stepwise:  # at most one end is between this sample and the pixel below the last one
                    moved = low_y > last_y
                    left, right = tl.where(moved, left_below, left), tl.where(moved, right_below, right)
                    left += _ended(data, count, left, low_x + low_y)
                    right += _ended(data, count, right, high_x + low_y)
                    last_y = low_y
                else:
                    left, right = _runs_before(data, count, highest_step, low_x + low_y, high_x + low_y)
                left_below = left + _ended(data, count, left, low_x + high_y)
                right_below = right + _ended(data, count, right, high_x + high_y)
                p00, p01, p10, p11 = left & 1, right & 1, left_below & 1, right_below & 1
            else:
                upper_line, lower_line = data + low_y * width, data + high_y * width
                p00, p01 = tl.load(upper_line + low_x), tl.load(upper_line + high_x)
                p10, p11 = tl.load(lower_line + low_x), tl.load(lower_line + high_x)
            upper = left_weight * p00.to(tl.float32) + right_weight * p01.to(tl.float32)
            lower = left_weight * p10.to(tl.float32) + right_weight * p11.to(tl.float32)
            sums += upper_weight[:, None] * upper + lower_weight[:, None] * lower
            i += 1
        j += SAMPLES
    return tl.sum(sums, 1)


@jit(do_not_specialize=["slots", "num_objects"])
def _bitmap_targets_kernel(
    pixels,  # uint8
    runs,  # int32
    objects,  # [G, 5]
    transforms,  # [G, 4]
    boxes,  # [K, 4] float32
    matches,  # [K]
    offsets,  # [B + 1], or None
    out,  # [K, H, W]
    slots,  # of an image
    num_objects,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    WITH_RUNS: tl.constexpr,
    WITH_PIXELS: tl.constexpr,
    ZEROS: tl.constexpr,  # whether targets without a bitmap or RLE are written
    BINS: tl.constexpr,
    SAMPLES: tl.constexpr,
    MAX_STEPWISE: tl.constexpr,
    RLE: tl.constexpr,
    OBJECT_COLUMNS: tl.constexpr,
):
    TILES: tl.constexpr = (HEIGHT * WIDTH + BINS - 1) // BINS
    roi = tl.program_id(0) // TILES
    bin = (tl.program_id(0) - roi * TILES) * BINS + tl.arange(0, BINS)
    roi = roi.to(tl.int64)
    box = boxes + roi * 4
    x1, y1, x2, y2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    index, valid = object_of(matches, offsets, roi, slots, num_objects)
    object = objects + index * OBJECT_COLUMNS
    kind = tl.load(object, mask=valid, other=-1)
    sampled = kind >= RLE
    height = tl.load(object + 3, mask=sampled, other=0).to(tl.int32)
    width = tl.load(object + 4, mask=sampled, other=0).to(tl.int32)
    transform = transforms + index * 4
    scale_x, scale_y = tl.load(transform, mask=sampled, other=1.0), tl.load(transform + 1, mask=sampled, other=1.0)
    offset_x, offset_y = (
        tl.load(transform + 2, mask=sampled, other=0.0),
        tl.load(transform + 3, mask=sampled, other=0.0),
    )
    x1, x2, mirrored = _in_own_pixels(x1, x2, scale_x, offset_x, ALIGNED)
    y1, y2, upside_down = _in_own_pixels(y1, y2, scale_y, offset_y, ALIGNED)
    value = tl.zeros((BINS,), tl.float32)
    p, q = bin // WIDTH, bin % WIDTH
    if sampled & finite_box(x1, y1, x2, y2) & (height > 0) & (width > 0):
        first, count = tl.load(object + 1), tl.load(object + 2).to(tl.int32)
        rows, columns = bins_along(y1, y2, height, HEIGHT, RATIO, True), bins_along(x1, x2, width, WIDTH, RATIO, True)
        row = axis_at(rows, tl.minimum(p, HEIGHT - 1).to(tl.float32), RATIO)
        stepwise = (RATIO == 0) & (tl.abs(y1) < MAX_STEPWISE) & (tl.abs(y2) < MAX_STEPWISE)
        column = axis_at(columns, q.to(tl.float32), RATIO)
        if WITH_RUNS and WITH_PIXELS:
            if kind == RLE:
                value = _sum_of_samples(runs + first, count, row, column, height, width, stepwise, RATIO, SAMPLES, True)
            else:
                value = _sum_of_samples(
                    pixels + first, count, row, column, height, width, stepwise, RATIO, SAMPLES, False
                )
        elif WITH_RUNS:
            value = _sum_of_samples(runs + first, count, row, column, height, width, stepwise, RATIO, SAMPLES, True)
        else:
            value = _sum_of_samples(pixels + first, count, row, column, height, width, stepwise, RATIO, SAMPLES, False)
        value = divide(value, tl.zeros_like(value) + tl.maximum(rows.grid * columns.grid, 1.0))
        p = tl.where(upside_down, HEIGHT - 1 - p, p)
        q = tl.where(mirrored, WIDTH - 1 - q, q)
    stored = bin < HEIGHT * WIDTH
    if not ZEROS:
        stored &= sampled
    tl.store(out + roi * (HEIGHT * WIDTH) + p * WIDTH + q, value, mask=stored)


@lru_cache(maxsize=1024)
def _prepared(spec: MaskTargetsSpec, with_runs: bool, with_pixels: bool, zeros: bool) -> Launch:
    return Launch(
        _bitmap_targets_kernel,
        HEIGHT=spec.height,
        WIDTH=spec.width,
        RATIO=spec.sampling_ratio,
        ALIGNED=spec.aligned,
        WITH_RUNS=with_runs,
        WITH_PIXELS=with_pixels,
        ZEROS=zeros,
        BINS=BINS,
        SAMPLES=SAMPLES,
        MAX_STEPWISE=MAX_STEPWISE,
        RLE=RLE,
        OBJECT_COLUMNS=OBJECT_COLUMNS,
        num_warps=1,
        enable_fp_fusion=False,
    )


def launch_bitmaps(
    pixels: Tensor,
    runs: Tensor,
    objects: Tensor,
    transforms: Tensor,
    boxes: Tensor,
    matches: Tensor,
    offsets: Tensor | None,
    out: Tensor,
    slots: int,
    spec: MaskTargetsSpec,
    *,
    zeros: bool,
) -> None:
    """Write the targets of bitmaps and RLE, and where `zeros` is set, zeros for all other RoIs."""
    launch = _prepared(spec, runs.numel() > 0, pixels.numel() > 0, zeros)
    with on_device_of(out):
        launch(
            (matches.numel() * ceil_div(spec.height * spec.width, BINS),),
            pixels,
            runs,
            objects,
            transforms.contiguous(),
            boxes.float().contiguous(),
            matches,
            offsets,
            out,
            slots,
            len(objects),
        )
