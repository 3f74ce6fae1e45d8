"""The RoIs that reach each region of a pyramid, in order: what the backward kernel walks.

A first kernel rounds each box once. A second one lists, for each region of REGION x REGION pixels of a level of an
image, the boxes of that level and image which reach it. Coarse levels come first: they have few regions and long lists,
and programs that take long must not start last.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import ceil_div, jit, tl, triton_dtype
from fastmask.kernels.roi_align.geometry import size_of
from fastmask.kernels.roi_align.levels import pack_sizes, pyramid_numbers
from fastmask.kernels.roi_pool.geometry import bin_edges, position_dtype, window_of

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import PyramidShape
    from fastmask.kernels.roi_pool.op import RoIPoolSpec

# A box of 2 x 512 on P2 to P5 is in 4 lists, and a tile skips three entries for each two that reach it. Not yet
# measured on a GPU.
REGION = 16
BOXES_PER_PROGRAM = 32
BOXES_PER_STEP = 128
WINDOW = 9  # numbers of a rounded box
# Entries of the lists of one pair of launches; more regions take several pairs.
MAX_LIST_ENTRIES = 1 << 25


@jit()
def _near(start, bin_size):
    """A first pixel as int32, and bins per pixel: 0 and 0 where the pixel is too far away."""
    near = tl.abs(start) < 2.0**30
    per_pixel = tl.where(near & (bin_size > 0), 1 / bin_size.to(tl.float32), 0.0)
    return tl.where(near, start, 0.0).to(tl.int32), per_pixel.to(tl.int32, bitcast=True)


@jit(do_not_specialize=["num_boxes", "num_images"])
def _round_boxes_kernel(
    boxes,  # [K, 5] of COMPUTE
    windows,  # [K, 9] int32, see `extents_of` and `bins_reaching`
    num_boxes,
    sizes,  # L packed (H_l, W_l)
    num_images,
    scales,  # L float64 bits
    PH: tl.constexpr,
    PW: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    POSITION: tl.constexpr,
    BOXES: tl.constexpr,
):
    k = tl.program_id(0) * BOXES + tl.arange(0, BOXES)
    box = boxes + tl.minimum(k, num_boxes - 1).to(tl.int64) * 5
    window = window_of(box, num_images, sizes, scales, PH, PW, THRESHOLDS, COMPUTE)
    y_first, _ = bin_edges(0, window.top, window.bin_height, window.height, POSITION)
    _, y_end = bin_edges(PH - 1, window.top, window.bin_height, window.height, POSITION)
    x_first, _ = bin_edges(0, window.left, window.bin_width, window.width, POSITION)
    _, x_end = bin_edges(PW - 1, window.left, window.bin_width, window.width, POSITION)
    touches = (window.image >= 0) & (y_first < y_end) & (x_first < x_end)
    group = tl.where(touches, window.image * len(sizes) + window.level, -1)
    top, bins_per_row = _near(window.top, window.bin_height)
    left, bins_per_column = _near(window.left, window.bin_width)
    row = windows + k.to(tl.int64) * 9
    numbers = (group, y_first, y_end, x_first, x_end, top, bins_per_row, left, bins_per_column)
    for column in tl.static_range(9):
        tl.store(row + column, numbers[column], mask=k < num_boxes)


@jit()
def extents_of(window):
    """First row, end of the rows, first column and end of the columns of rounded boxes, clipped to their level."""
    return tl.load(window + 1), tl.load(window + 2), tl.load(window + 3), tl.load(window + 4)


@jit()
def bins_reaching(axis, first, end, BINS: tl.constexpr):
    """A range of bins that includes all which hold pixels first to end - 1; `axis` is column 5 or 7 of a window."""
    SLACK: tl.constexpr = 1e-6 * BINS  # more than rounding can shift
    start, per_pixel = tl.load(axis), tl.load(axis + 1).to(tl.float32, bitcast=True)
    low = tl.floor((first - start).to(tl.float32) * per_pixel - SLACK)
    high = tl.ceil((end - start).to(tl.float32) * per_pixel + SLACK)
    high = tl.where(per_pixel > 0, tl.minimum(high, 2.0**30), 2.0**30)
    low = tl.minimum(tl.maximum(low, 0.0), 2.0**30)
    return tl.minimum(low.to(tl.int32), BINS), tl.minimum(tl.maximum(high, 0.0).to(tl.int32), BINS)


@jit()
def region_of(region, sizes, num_images, REGION: tl.constexpr):
    """Level, image, first row and first column of a region, and the level's height and width."""
    LAST: tl.constexpr = len(sizes) - 1
    level, packed, start, end = LAST, sizes[LAST], 0, 0
    for finer in tl.static_range(LAST):
        height, width = size_of(sizes[LAST - finer])
        end += tl.cdiv(height, REGION) * tl.cdiv(width, REGION) * num_images
        if region >= end:
            level, packed, start = LAST - 1 - finer, sizes[LAST - 1 - finer], end
    height, width = size_of(packed)
    rows, columns = tl.cdiv(height, REGION), tl.cdiv(width, REGION)
    image = (region - start) // (rows * columns)
    local = (region - start) % (rows * columns)
    return level, image, local // columns * REGION, local % columns * REGION, height, width


@jit(do_not_specialize=["num_boxes", "num_images", "first_region"])
def _list_boxes_by_region_kernel(
    windows,  # [K, 9] int32
    listed,  # [regions, K] int32
    counts,  # [regions] int32
    num_boxes,
    first_region,
    sizes,  # L packed (H_l, W_l)
    num_images,
    REGION: tl.constexpr,
    STEP: tl.constexpr,
):
    region = first_region + tl.program_id(0)
    level, image, row, column, _, _ = region_of(region, sizes, num_images, REGION)
    group = image * len(sizes) + level
    listed += tl.program_id(0).to(tl.int64) * num_boxes
    count = 0
    for start in range(0, num_boxes, STEP):
        k = start + tl.arange(0, STEP)
        window = windows + tl.minimum(k, num_boxes - 1).to(tl.int64) * 9
        y_first, y_end, x_first, x_end = extents_of(window)
        hit = (k < num_boxes) & (tl.load(window) == group) & (y_first < row + REGION) & (y_end > row)
        hit &= (x_first < column + REGION) & (x_end > column)
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(listed + place, k, mask=hit)
        count += tl.sum(hit.to(tl.int32), 0)
    tl.store(counts + tl.program_id(0), count)


def count_regions(shape: PyramidShape) -> int:
    """The number of regions of all levels and images."""
    return shape.num_images * sum(ceil_div(height, REGION) * ceil_div(width, REGION) for height, width in shape.levels)


@lru_cache(maxsize=1024)
def _prepared_rounding(shape: PyramidShape, spec: RoIPoolSpec, dtype: torch.dtype) -> Launch:
    return Launch(
        _round_boxes_kernel,
        *pyramid_numbers(spec, shape.num_images, shape.levels),
        PH=spec.pooled_height,
        PW=spec.pooled_width,
        THRESHOLDS=spec.thresholds(dtype),
        COMPUTE=triton_dtype(dtype),
        POSITION=position_dtype(shape.levels, dtype),
        BOXES=BOXES_PER_PROGRAM,
        num_warps=1,
        enable_fp_fusion=False,
    )


def round_boxes(boxes: Tensor, shape: PyramidShape, spec: RoIPoolSpec) -> Tensor:
    """The rounded windows `[K, 9]` of contiguous boxes `[K, 5]`, int32. Their device is current."""
    num_boxes = boxes.shape[0]
    windows = torch.empty((num_boxes, WINDOW), dtype=torch.int32, device=boxes.device)
    if num_boxes:
        launch = _prepared_rounding(shape, spec, boxes.dtype)
        launch((ceil_div(num_boxes, BOXES_PER_PROGRAM),), boxes, windows, num_boxes)
    return windows


@lru_cache(maxsize=1024)
def _prepared_lists(shape: PyramidShape, step: int) -> Launch:
    return Launch(
        _list_boxes_by_region_kernel, pack_sizes(shape.levels), shape.num_images, REGION=REGION, STEP=step, num_warps=1
    )


def list_boxes_by_region(
    windows: Tensor, shape: PyramidShape, first_region: int, num_regions: int
) -> tuple[Tensor, Tensor]:
    """The boxes that reach each of `num_regions` regions, ascending: `listed [regions, K]` and `counts [regions]`.

    The device of `windows` is current.
    """
    num_boxes, device = windows.shape[0], windows.device
    listed = torch.empty((num_regions, num_boxes), dtype=torch.int32, device=device)
    counts = torch.empty(num_regions, dtype=torch.int32, device=device)
    launch = _prepared_lists(shape, BOXES_PER_STEP)
    launch((num_regions,), windows, listed, counts, num_boxes, first_region)
    return listed, counts
