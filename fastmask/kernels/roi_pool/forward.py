"""RoIPool's forward kernel: a warp pools one row of bins of a RoI from its level."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    ceil_div,
    jit,
    next_power_of_2,
    on_device_of,
    tl,
    triton_dtype,
)
from fastmask.kernels.roi_align.levels import pyramid_numbers
from fastmask.kernels.roi_pool.geometry import bin_edges, lowest_feature, position_dtype, window_of

if TYPE_CHECKING:
    from fastmask.kernels.roi_pool.op import RoIPoolSpec

# A warp takes one row of bins: its loop runs over the pixels of one bin, 8 on P2; that of a block of bins runs over
# those of the largest, 12. 32 programs per multiprocessor may have 64 registers; sm_90 needs 62. Four pixels in flight
# hide no more latency, and read one pixel in five again. Not yet measured on a GPU.
CHANNELS_PER_PROGRAM = 256
PIXELS_IN_FLIGHT = 2


@jit(do_not_specialize=["num_images"])
def _roi_pool_kernel(
    features,  # L of [N, H_l, W_l, C]
    boxes,  # [K, 5] of COMPUTE
    output,  # [K, PH, PW, C]
    argmax,  # [K, PH, PW, C] int32
    sizes,  # L packed (H_l, W_l)
    num_images,
    scales,  # L float64 bits
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    POSITION: tl.constexpr,
    LOWEST: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    k = (tl.program_id(0) // PH).to(tl.int64)
    p = tl.program_id(0) % PH
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = None if C % CHANNELS == 0 else channel < C
    window = window_of(boxes + k * 5, num_images, sizes, scales, PH, PW, THRESHOLDS, COMPUTE)
    feature = features[0]
    for index in tl.static_range(1, len(features)):
        if window.level == index:
            feature = features[index]
    feature += window.image.to(tl.int64) * window.height * window.width * C + channel
    y0, y1 = bin_edges(p, window.top, window.bin_height, window.height, POSITION)

    bin = (k * PH + p) * PW * C
    for q in range(PW):
        x0, x1 = bin_edges(q, window.left, window.bin_width, window.width, POSITION)
        best = tl.full((CHANNELS,), LOWEST, COMPUTE)
        winner = tl.full((CHANNELS,), -1, tl.int32)
        columns = x1 - x0
        pixels = tl.where(y0 < y1, columns, 0) * (y1 - y0)
        x, pixel, last = x0, y0 * window.width + x0, (y1 - 1) * window.width + x1 - 1
        for _ in range(pixels // UNROLL + tl.minimum(pixels % UNROLL, 1)):
            for _ in tl.static_range(UNROLL):  # several loads in flight
                value = tl.load(feature + pixel.to(tl.int64) * C, mask=mask).to(COMPUTE)
                larger = value > best  # False for NaN
                best = tl.where(larger, value, best)
                winner = tl.where(larger, pixel, winner)
                end_of_row = x == x1 - 1
                step = tl.where(end_of_row, window.width - columns + 1, 1)
                x = tl.where(end_of_row, x0, x + 1)
                pixel += tl.where(pixel == last, 0, step)  # the last one does not win again: it is not larger
        best = tl.where(pixels > 0, best, 0.0)
        tl.store(output + bin + q * C + channel, best.to(output.dtype.element_ty), mask=mask)
        tl.store(argmax + bin + q * C + channel, winner, mask=mask)


@lru_cache(maxsize=1024)
def _prepared(
    spec: RoIPoolSpec, shapes: tuple[torch.Size, ...], dtype: torch.dtype, box_dtype: torch.dtype
) -> tuple[int, Launch]:
    """The blocks of channels, and the launch."""
    num_images, channels = shapes[0][:2]
    levels = [(height, width) for _, _, height, width in shapes]
    block = min(CHANNELS_PER_PROGRAM, next_power_of_2(channels))
    launch = Launch(
        _roi_pool_kernel,
        *pyramid_numbers(spec, num_images, levels),
        C=channels,
        PH=spec.pooled_height,
        PW=spec.pooled_width,
        THRESHOLDS=spec.thresholds(box_dtype),
        COMPUTE=triton_dtype(dtype),
        POSITION=position_dtype(levels, dtype),
        LOWEST=lowest_feature(dtype),
        CHANNELS=block,
        UNROLL=PIXELS_IN_FLIGHT,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return ceil_div(channels, block), launch


def launch_roi_pool(features: Sequence[Tensor], boxes: Tensor, spec: RoIPoolSpec) -> tuple[Tensor, Tensor]:
    """Pooled features, and which pixel each is, or -1."""
    output, argmax = spec.empty_outputs(features, boxes)
    if not output.numel():
        return output, argmax
    shapes = tuple([feature.shape for feature in features])
    channel_blocks, launch = _prepared(spec, shapes, output.dtype, boxes.dtype)
    # Channels innermost, and transposed once: a bin of an NCHW output is a sector of 32 bytes for each channel.
    pooled = output
    if not output.is_contiguous(memory_format=torch.channels_last):
        pooled = torch.empty_like(output, memory_format=torch.channels_last)
    features = tuple([feature.contiguous(memory_format=torch.channels_last) for feature in features])
    with on_device_of(boxes):
        grid = boxes.shape[0] * spec.pooled_height, channel_blocks
        launch(grid, features, boxes.contiguous(), pooled, argmax)
    return output if pooled is output else output.copy_(pooled), argmax
