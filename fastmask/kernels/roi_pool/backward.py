"""Gradient of RoIPool: to the pixel that won each bin.

    grad_features[l][n, c, y, x] = sum over RoIs k of level l and image n, and bins (p, q) with
                                   argmax[k, c, p, q] = y * W_l + x, of grad[k, c, p, q]

Each program owns a tile of pixels, walks the RoIs that reach its region (`regions.py`) and adds their gradients in the
order of RoIs, then bins: the order of torchvision's loop on the CPU, to the bit. There are no atomics and no sort, and
each gradient is written once, zeros included.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    ceil_div,
    current_device,
    jit,
    next_power_of_2,
    on_device_of,
    target_backend,
    tl,
    triton_dtype,
)
from fastmask.kernels.roi_align.levels import pack_sizes
from fastmask.kernels.roi_pool.regions import (
    MAX_LIST_ENTRIES,
    REGION,
    bins_reaching,
    count_regions,
    extents_of,
    list_boxes_by_region,
    region_of,
    round_boxes,
)

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import PyramidShape
    from fastmask.kernels.roi_pool.op import RoIPoolSpec

# A bin compares its winners with all pixels of each tile that it reaches. For 2 x 512 RoIs on P2 to P5, all programs
# execute (sm_90, bfloat16, millions of instructions) and read: 46 and 256 MB with 2 x 4 pixels x 256 channels, 57 and
# 187 MB with 4 x 4 x 128, 62 and 256 MB with 2 x 4 x 128, 52 and 351 MB with 2 x 2 x 256. One warp holds all pixels of
# its channels, so that no row of gradients passes through shared memory. Not yet measured on a GPU.
TILE_ROWS, TILE_COLUMNS = 2, 4
CHANNELS_PER_PROGRAM = {2: 256, 4: 256, 8: 128}  # by the bytes of an element
MAX_CHANNELS_ON_HIP = 128  # 256 spill on gfx942, whose comparisons occupy scalar registers
BINS_IN_FLIGHT = 2  # the latency of a second load is hidden where few programs run; a third would often read no bin


@jit(do_not_specialize=["num_boxes", "num_images", "first_region"])
def _roi_pool_backward_kernel(
    grad,  # [K, PH, PW, C]
    argmax,  # [K, PH, PW, C] int32
    windows,  # [K, 9] int32
    listed,  # [regions, K] int32
    counts,  # [regions] int32
    outputs,  # L of [N, C, H_l, W_l] in either layout
    num_boxes,
    first_region,
    sizes,  # L packed (H_l, W_l)
    num_images,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # the outputs
    COMPUTE: tl.constexpr,
    REGION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    ACROSS: tl.constexpr = REGION // COLUMNS
    TILES: tl.constexpr = REGION // ROWS * ACROSS
    region, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    level, image, top, left, height, width = region_of(first_region + region, sizes, num_images, REGION)
    top += tile // ACROSS * ROWS
    left += tile % ACROSS * COLUMNS
    if (top >= height) | (left >= width):
        return
    y = top + tl.arange(0, ROWS * COLUMNS) // COLUMNS
    x = left + tl.arange(0, ROWS * COLUMNS) % COLUMNS
    pixel = y * width + x
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)

    sums = tl.zeros((ROWS * COLUMNS, CHANNELS), COMPUTE)
    listed += region.to(tl.int64) * num_boxes
    for entry in range(tl.load(counts + region)):
        k = tl.load(listed + entry).to(tl.int64)
        window = windows + k * 9
        y_first, y_end, x_first, x_end = extents_of(window)
        if (y_first < top + ROWS) & (y_end > top) & (x_first < left + COLUMNS) & (x_end > left):
            p, p_end = bins_reaching(window + 5, top, top + ROWS, PH)
            q, q_end = bins_reaching(window + 7, left, left + COLUMNS, PW)
            columns = q_end - q
            count = (p_end - p) * columns
            bin, end_of_row = p * PW + q, p * PW + q_end - 1
            grad_roi = grad + k * (PH * PW * C) + channel[None, :]
            argmax_roi = argmax + k * (PH * PW * C) + channel[None, :]
            for first in range(0, count, UNROLL):
                for i in tl.static_range(UNROLL):  # several loads in flight
                    valid = first + i < count if C % CHANNELS == 0 else (first + i < count) & (channel < C)[None, :]
                    value = tl.load(grad_roi + bin * C, mask=valid, other=0.0).to(COMPUTE)
                    winner = tl.load(argmax_roi + bin * C, mask=valid, other=-1)
                    # A sum is never -0, so that adding nothing is adding 0.
                    sums = tl.where(winner == pixel[:, None], sums + value, sums)
                    last = bin == end_of_row
                    bin += tl.where(last, PW - columns + 1, 1)
                    end_of_row += tl.where(last, PW, 0)

    output = outputs[0]
    for index in tl.static_range(1, len(sizes)):
        if level == index:
            output = outputs[index]
    exists = ((y < height) & (x < width))[:, None] & (channel < C)[None, :]
    output += image.to(tl.int64) * height * width * C
    if CHANNELS_LAST:
        place = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    else:
        place = pixel[:, None] + channel.to(tl.int64)[None, :] * height * width
    tl.store(output + place, sums.to(output.dtype.element_ty), mask=exists)


@lru_cache(maxsize=1024)
def _prepared(
    spec: RoIPoolSpec, shape: PyramidShape, channels: int, dtype: torch.dtype, channels_last: bool, device: Any
) -> tuple[int, int, Launch]:
    """The regions, the blocks of channels, and the launch; `device` is the current one, as Triton names it."""
    del device  # the blocks depend on its architecture
    block = min(CHANNELS_PER_PROGRAM[dtype.itemsize], next_power_of_2(channels))
    block = min(block, MAX_CHANNELS_ON_HIP) if target_backend() == "hip" else block
    launch = Launch(
        _roi_pool_backward_kernel,
        pack_sizes(shape.levels),
        shape.num_images,
        C=channels,
        PH=spec.pooled_height,
        PW=spec.pooled_width,
        CHANNELS_LAST=channels_last,
        COMPUTE=triton_dtype(dtype),
        REGION=REGION,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        CHANNELS=block,
        UNROLL=BINS_IN_FLIGHT,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return count_regions(shape), ceil_div(channels, block), launch


def launch_roi_pool_backward(
    grad: Tensor, boxes: Tensor, argmax: Tensor, shape: PyramidShape, channels_last: bool, spec: RoIPoolSpec
) -> list[Tensor]:
    """Gradients of the levels."""
    grads = shape.empty_features(grad, channels_last)
    if not any(output.numel() for output in grads):
        return grads
    grad = grad.contiguous(memory_format=torch.channels_last)
    argmax = argmax.contiguous(memory_format=torch.channels_last)
    outputs, num_boxes = tuple(grads), boxes.shape[0]
    tiles = REGION // TILE_ROWS * (REGION // TILE_COLUMNS)
    with on_device_of(grad):
        regions, channel_blocks, launch = _prepared(
            spec, shape, grad.shape[1], grad.dtype, channels_last, current_device()
        )
        windows = round_boxes(boxes.contiguous(), shape, spec)
        step = min(regions, max(1, MAX_LIST_ENTRIES // max(num_boxes, 1)))
        for first_region in range(0, regions, step):
            in_launch = min(step, regions - first_region)
            listed, counts = list_boxes_by_region(windows, shape, first_region, in_launch)
            grid = in_launch * tiles, channel_blocks
            launch(grid, grad, argmax, windows, listed, counts, outputs, num_boxes, first_region)
    return grads
