"""RoIAlign's forward kernel: a program pools the bins of one box, or a part of them, tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    ceil_div,
    divide,
    float_of,
    jit,
    next_power_of_2,
    on_device_of,
    tl,
    triton_dtype,
)
from fastmask.kernels.roi_align.geometry import (
    axis_at,
    bins_along,
    finite_box,
    level_of,
    neighbours,
    scaled_box,
    size_of,
)
from fastmask.kernels.roi_align.levels import pyramid_numbers

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import RoIAlignSpec

# Chosen by compiling and by counting what is executed; not yet measured on a GPU. A thread has 32 channels of one bin,
# 16 bytes in each line of 128: the geometry of a bin is computed once for all of them, and a pixel's lines are read
# at constant offsets. On sm_90, 2 warps pool 8 bins of 256 bfloat16 channels in 1285 instructions (ratio 2).
BINS_PER_TILE = 8
LINE_BYTES = 128
LINES_PER_PROGRAM = {2: 4, 4: 8, 8: 8}  # by the bytes of an element
NUM_WARPS = 2
# One program takes all tiles of a box, so that neighbouring bins read each other's pixels from the L1 cache, unless
# there would be fewer programs than this: 132 SMs hold 8 each. Adaptive grids need more programs to balance the SMs.
PROGRAMS, PROGRAMS_ADAPTIVE = 132 * 8, 132 * 32
MAX_NARROW_OFFSET = 2**31 - 1  # elements of an image's level; offsets in larger levels are 64 bits wide


@jit()
def _to_float(x, COMPUTE: tl.constexpr):
    """x in COMPUTE. A bfloat16 is the upper half of a float32: shifting needs fewer instructions than converting."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(COMPUTE)


@jit()
def _add_sample(value, feature, line, y, x, width, mask, C: tl.constexpr, OFFSET: tl.constexpr):
    """`value [bins, lines, channels]` plus the feature at a sample of each bin; y and x are its `neighbours`."""
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            offset = (y[row].to(OFFSET) * width + x[column]) * C
            weight = y[2 + row] * x[2 + column]
            pixel = feature + offset[:, None, None] + line
            loaded = tl.load(pixel) if mask is None else tl.load(pixel, mask=mask, other=0.0)
            value = tl.fma(_to_float(loaded, value.dtype), weight[:, None, None], value)
    return value


@jit()
def _scale(neighbours, factor):
    """Neighbours with their weights times a factor."""
    return neighbours[0], neighbours[1], neighbours[2] * factor, neighbours[3] * factor


@jit(do_not_specialize=["num_images", "tiles_per_program"])
def _roi_align_forward_kernel(
    features,  # L of [N, H_l, W_l, C]
    boxes,  # [K, 5] of COMPUTE
    output,  # [K, PH * PW, C] or [K, C, PH * PW]
    argmax,  # like output, int32; written for the maximum only
    tiles_per_program,
    sizes,  # L packed (H_l, W_l)
    num_images,
    scales,  # L float64 bits
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    REDUCTION: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # the output
    COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr,  # the dtype of offsets in an image's level
    BINS: tl.constexpr,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    TILES: tl.constexpr = (PH * PW + BINS - 1) // BINS
    k = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, LINES)[None, :, None] * CHANNELS
    in_line = tl.program_id(2) * (LINES * CHANNELS) + tl.arange(0, CHANNELS)[None, None, :]
    channel = line + in_line
    mask = None if C % (LINES * CHANNELS) == 0 else channel < C

    box = boxes + k * 5
    image, level, pooled = level_of(box, num_images, THRESHOLDS, len(features))
    feature, packed, scale = features[0], sizes[0], scales[0]
    for index in tl.static_range(1, len(features)):
        if level == index:
            feature, packed, scale = features[index], sizes[index], scales[index]
    height, width = size_of(packed)
    feature += image * height * width * C + in_line
    x1, y1, x2, y2 = scaled_box(box, float_of(scale, COMPUTE), ALIGNED)
    pooled = pooled & finite_box(x1, y1, x2, y2) & (height > 0) & (width > 0)
    rows = bins_along(y1, y2, height, PH, RATIO, ALIGNED)
    columns = bins_along(x1, x2, width, PW, RATIO, ALIGNED)
    per_sample = divide(x1 * 0 + 1.0, tl.maximum(rows.grid * columns.grid, 1.0))
    output += k * (PH * PW * C)
    argmax += k * (PH * PW * C)

    first = tl.program_id(1) * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, TILES)):
        bin = tile * BINS + tl.arange(0, BINS)
        value = tl.zeros((BINS, LINES, CHANNELS), COMPUTE)
        winner = tl.zeros((BINS, LINES, CHANNELS), tl.int32)
        if pooled:
            clamped = tl.minimum(bin, PH * PW - 1)
            row = axis_at(rows, (clamped // PW).to(COMPUTE), RATIO)
            column = axis_at(columns, (clamped % PW).to(COMPUTE), RATIO)
            if REDUCTION == "mean" and RATIO > 0 and RATIO <= 3:  # unrolled; more would take too long to compile
                for i in tl.static_range(RATIO):
                    y = _scale(neighbours(row, i, RATIO), 1.0 / (RATIO * RATIO))
                    for j in tl.static_range(RATIO):
                        x = neighbours(column, j, RATIO)
                        value = _add_sample(value, feature, line, y, x, width, mask, C, OFFSET)
            else:
                across = column.visited.to(tl.int32)
                num_rows = RATIO if RATIO > 0 else tl.max(row.visited, 0).to(tl.int32)
                num_columns = RATIO if RATIO > 0 else tl.max(across, 0)
                for i in range(num_rows):
                    y = neighbours(row, i, RATIO)
                    if REDUCTION == "mean":
                        y = _scale(y, per_sample)
                    for j in range(num_columns):
                        x = neighbours(column, j, RATIO)
                        if REDUCTION == "mean":
                            value = _add_sample(value, feature, line, y, x, width, mask, C, OFFSET)
                        else:
                            sampled = _add_sample(tl.zeros_like(value), feature, line, y, x, width, mask, C, OFFSET)
                            visited = ((i < row.visited) & (j < across))[:, None, None]
                            better = visited & ((sampled > value) | (i + j == 0))
                            value = tl.where(better, sampled, value)
                            winner = tl.where(better, (i * across + j)[:, None, None], winner)

        stored = (bin < PH * PW)[:, None, None]
        if mask is not None:
            stored &= mask
        place = bin[:, None, None] * C + channel if CHANNELS_LAST else bin[:, None, None] + channel * (PH * PW)
        tl.store(output + place, value.to(output.dtype.element_ty), mask=stored)
        if REDUCTION == "max":
            tl.store(argmax + place, winner, mask=stored)


@lru_cache(maxsize=1024)
def _prepared(
    spec: RoIAlignSpec,
    shapes: tuple[torch.Size, ...],
    dtype: torch.dtype,
    box_dtype: torch.dtype,
    channels_last: bool,
    max_narrow_offset: int,
) -> tuple[int, int, Launch]:
    """The tiles of a box, the blocks of channels, and the launch."""
    num_images, channels = shapes[0][:2]
    levels = [(height, width) for _, _, height, width in shapes]
    line = min(LINE_BYTES // dtype.itemsize, next_power_of_2(channels))
    lines = LINES_PER_PROGRAM[dtype.itemsize] // (2 if spec.reduction == "max" else 1)  # room for the winners
    lines = min(lines, next_power_of_2(ceil_div(channels, line)))
    largest = max(height * width for height, width in levels) * channels
    launch = Launch(
        _roi_align_forward_kernel,
        *pyramid_numbers(spec, num_images, levels),
        C=channels,
        PH=spec.pooled_height,
        PW=spec.pooled_width,
        RATIO=max(spec.sampling_ratio, 0),
        ALIGNED=spec.aligned,
        REDUCTION=spec.reduction,
        THRESHOLDS=spec.thresholds(box_dtype),
        CHANNELS_LAST=channels_last,
        COMPUTE=triton_dtype(dtype),
        OFFSET=tl.int32 if largest <= max_narrow_offset else tl.int64,
        BINS=BINS_PER_TILE,
        LINES=lines,
        CHANNELS=line,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return ceil_div(spec.pooled_height * spec.pooled_width, BINS_PER_TILE), ceil_div(channels, line * lines), launch


def launch_roi_align(features: Sequence[Tensor], boxes: Tensor, spec: RoIAlignSpec) -> tuple[Tensor, Tensor]:
    """Pooled features, and for the maximum which sample of its bin each is."""
    output, argmax = spec.empty_outputs(features, boxes)
    if not output.numel():
        return output, argmax
    num_boxes = boxes.shape[0]
    shapes = tuple([feature.shape for feature in features])
    tiles, channel_blocks, launch = _prepared(
        spec, shapes, output.dtype, boxes.dtype, not output.is_contiguous(), MAX_NARROW_OFFSET
    )
    programs = PROGRAMS if spec.sampling_ratio > 0 else PROGRAMS_ADAPTIVE
    tiles_per_program = ceil_div(tiles, ceil_div(programs, num_boxes * channel_blocks))
    features = tuple([feature.contiguous(memory_format=torch.channels_last) for feature in features])
    with on_device_of(boxes):
        grid = num_boxes, ceil_div(tiles, tiles_per_program), channel_blocks
        launch(grid, features, boxes.contiguous(), output, argmax, tiles_per_program)
    return output, argmax
