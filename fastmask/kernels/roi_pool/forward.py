"""RoIPool's forward kernel: a program pools a block of bins and channels of one RoI."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._runtime import (
    ceil_div,
    float64_bits,
    is_channels_last,
    jit,
    next_power_of_2,
    on_device_of,
    tl,
    triton_dtype,
)
from fastmask.kernels.roi_pool.geometry import bin_edges, lowest_feature, windows

if TYPE_CHECKING:
    from fastmask.kernels.roi_pool.op import RoIPoolSpec

# Chosen by compiling: no spills on any architecture. Not yet measured on a GPU.
BINS_PER_PROGRAM = 8
CHANNELS_PER_PROGRAM = 256


@jit(do_not_specialize=["num_boxes", "num_images", "height", "width", "scale_bits"])
def _roi_pool_kernel(
    features,  # [N, H, W, C]
    boxes,  # [K, 5] of COMPUTE
    output,  # [K, C, PH, PW] in either layout
    argmax,  # [K, PH, PW, C] int32
    num_boxes,
    num_images,
    height,
    width,
    scale_bits,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # the output
    COMPUTE: tl.constexpr,
    LOWEST: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (PH * PW + BINS - 1) // BINS
    k = tl.program_id(0) // BLOCKS
    bin = tl.program_id(0) % BLOCKS * BINS + tl.arange(0, BINS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image, left, top, bin_width, bin_height = windows(boxes, k, num_boxes, num_images, scale_bits, PH, PW, COMPUTE)
    y0, y1 = bin_edges(bin // PW, top, bin_height, height)
    x0, x1 = bin_edges(bin % PW, left, bin_width, width)
    y1 = tl.where(bin < PH * PW, y1, y0)  # bins past the last are empty

    features += image.to(tl.int64) * height * width * C
    best = tl.full((BINS, CHANNELS), LOWEST, COMPUTE)
    winner = tl.full((BINS, CHANNELS), -1, tl.int32)
    for i in range(tl.max(y1 - y0, 0)):
        for j in range(tl.max(x1 - x0, 0)):
            y, x = y0 + i, x0 + j
            pixel = y * width + x
            inside = ((y < y1) & (x < x1))[:, None] & (channel < C)[None, :]
            row = features + pixel.to(tl.int64)[:, None] * C + channel[None, :]
            value = tl.load(row, mask=inside, other=LOWEST).to(COMPUTE)
            larger = value > best  # False for NaN
            best = tl.where(larger, value, best)
            winner = tl.where(larger, pixel[:, None], winner)
    empty = (y0 >= y1) | (x0 >= x1)
    best = tl.where(empty[:, None], 0.0, best)

    exists = (bin < PH * PW)[:, None] & (channel < C)[None, :]
    roi = k.to(tl.int64) * (PH * PW * C)
    rows = roi + bin[:, None] * C + channel[None, :]
    tl.store(argmax + rows, winner, mask=exists)
    if CHANNELS_LAST:
        tl.store(output + rows, best.to(output.dtype.element_ty), mask=exists)
    else:
        columns = roi + bin[:, None] + channel[None, :] * (PH * PW)
        tl.store(output + columns, best.to(output.dtype.element_ty), mask=exists)


def launch_roi_pool(input: Tensor, boxes: Tensor, spec: RoIPoolSpec) -> tuple[Tensor, Tensor]:
    """Pooled features, and which pixel each is, or -1."""
    num_images, channels, height, width = input.shape
    output, argmax = spec.empty_outputs(input, boxes)
    if not output.numel():
        return output, argmax
    block = min(CHANNELS_PER_PROGRAM, next_power_of_2(channels))
    bin_blocks = ceil_div(spec.pooled_height * spec.pooled_width, BINS_PER_PROGRAM)
    with on_device_of(input):
        _roi_pool_kernel[(len(boxes) * bin_blocks, ceil_div(channels, block))](
            input.contiguous(memory_format=torch.channels_last),
            boxes.contiguous(),
            output,
            argmax,
            len(boxes),
            num_images,
            height,
            width,
            float64_bits(spec.spatial_scale),
            C=channels,
            PH=spec.pooled_height,
            PW=spec.pooled_width,
            CHANNELS_LAST=is_channels_last(input),
            COMPUTE=triton_dtype(input.dtype),
            LOWEST=lowest_feature(input.dtype),
            BINS=BINS_PER_PROGRAM,
            CHANNELS=block,
            enable_fp_fusion=False,
        )
    return output, argmax
