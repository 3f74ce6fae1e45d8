"""RoIAlign's forward kernel: a program pools a block of bins and channels of one box from its level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._runtime import (
    ceil_div,
    divide,
    float_of,
    jit,
    next_power_of_2,
    on_device_of,
    pack_size,
    tl,
    triton_dtype,
)
from fastmask.kernels.roi_align.geometry import axis_of, finite_box, level_of, neighbours, scaled_box, size_of

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import RoIAlignSpec

# [bins x channels] of a program. Chosen by compiling: 16 sums a thread, all loads 16 bytes, see
# docs/compile_report.md; not yet measured on a GPU.
BINS_PER_PROGRAM = 8
CHANNELS_PER_PROGRAM = {2: 256, 4: 256, 8: 64}  # by the bytes of an element
NUM_WARPS = 4


@jit()
def _sample(feature, y, x, width, channel, mask, C: tl.constexpr):
    """Interpolated values `[bins, channels]` at a sample of each bin; y and x are its `neighbours` along the axes."""
    dtype = y[2].dtype
    value = tl.zeros((y[0].shape[0], channel.shape[0]), dtype)
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            pixel = feature + (y[row].to(tl.int64) * width + x[column])[:, None] * C + channel[None, :]
            loaded = tl.load(pixel) if mask is None else tl.load(pixel, mask=mask[None, :], other=0.0)
            value = tl.fma(loaded.to(dtype), (y[2 + row] * x[2 + column])[:, None], value)
    return value


@jit()
def _mask_weights(visited, taps):
    """Neighbours with weight 0 for bins that have no such sample."""
    return taps[0], taps[1], tl.where(visited, taps[2], 0.0), tl.where(visited, taps[3], 0.0)


@jit(do_not_specialize=["num_images"])
def _roi_align_forward_kernel(
    features,  # L of [N, H_l, W_l, C]
    boxes,  # [K, 5] of COMPUTE
    output,  # [K, PH * PW, C] or [K, C, PH * PW]
    argmax,  # like output, int32; written for the maximum only
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
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (PH * PW + BINS - 1) // BINS
    k = (tl.program_id(0) // BLOCKS).to(tl.int64)
    bin = tl.program_id(0) % BLOCKS * BINS + tl.arange(0, BINS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = None if C % CHANNELS == 0 else channel < C

    box = boxes + k * 5
    image, level, pooled = level_of(box, num_images, THRESHOLDS, len(features))
    feature, packed, scale = features[0], sizes[0], scales[0]
    for index in tl.static_range(1, len(features)):
        if level == index:
            feature, packed, scale = features[index], sizes[index], scales[index]
    height, width = size_of(packed)
    feature += image * height * width * C

    value = tl.zeros((BINS, CHANNELS), COMPUTE)
    winner = tl.zeros((BINS, CHANNELS), tl.int32)
    x1, y1, x2, y2 = scaled_box(box, float_of(scale, COMPUTE), ALIGNED)
    if pooled & finite_box(x1, y1, x2, y2) & (height > 0) & (width > 0):
        row, column = (bin // PW).to(COMPUTE), (bin % PW).to(COMPUTE)
        rows = axis_of(y1, y2, row, height, PH, RATIO, ALIGNED)
        columns = axis_of(x1, x2, column, width, PW, RATIO, ALIGNED)
        if RATIO > 0 and RATIO <= 3:  # unrolled; larger grids would take too long to compile
            for i in tl.static_range(RATIO):
                y = neighbours(rows, i, RATIO)
                for j in tl.static_range(RATIO):
                    x = neighbours(columns, j, RATIO)
                    sampled = _sample(feature, y, x, width, channel, mask, C)
                    if REDUCTION == "max":
                        better = (sampled > value) | (i + j == 0)
                        value = tl.where(better, sampled, value)
                        winner = tl.where(better, i * RATIO + j, winner)
                    else:
                        value += sampled
        else:
            for i in range(tl.max(rows.visited, 0).to(tl.int32)):
                y = _mask_weights(i < rows.visited, neighbours(rows, i, RATIO))
                for j in range(tl.max(columns.visited, 0).to(tl.int32)):
                    x = _mask_weights(j < columns.visited, neighbours(columns, j, RATIO))
                    sampled = _sample(feature, y, x, width, channel, mask, C)
                    if REDUCTION == "max":
                        visited = ((i < rows.visited) & (j < columns.visited))[:, None]
                        better = visited & ((sampled > value) | (i + j == 0))
                        value = tl.where(better, sampled, value)
                        winner = tl.where(better, (i * columns.visited.to(tl.int32) + j)[:, None], winner)
                    else:
                        value += sampled
        if REDUCTION == "mean":
            if RATIO > 0 and (RATIO & (RATIO - 1)) == 0:
                value *= 1.0 / (RATIO * RATIO)  # exact
            else:
                value = divide(value, tl.maximum(rows.grid * columns.grid, 1.0)[:, None])

    start = k * (PH * PW * C)
    if CHANNELS_LAST:
        index = start + (bin * C)[:, None] + channel[None, :]
    else:
        index = start + bin[:, None] + (channel * (PH * PW))[None, :]
    stored = (bin < PH * PW)[:, None] if mask is None else (bin < PH * PW)[:, None] & mask[None, :]
    tl.store(output + index, value.to(output.dtype.element_ty), mask=stored)
    if REDUCTION == "max":
        tl.store(argmax + index, winner, mask=stored)


def launch_roi_align(features: Sequence[Tensor], boxes: Tensor, spec: RoIAlignSpec) -> tuple[Tensor, Tensor]:
    """Pooled features, and for the maximum which sample of its bin each is."""
    output, argmax = spec.empty_outputs(features, boxes)
    if not output.numel():
        return output, argmax
    channels = features[0].shape[1]
    block = min(CHANNELS_PER_PROGRAM[output.element_size()], next_power_of_2(channels))
    bin_blocks = ceil_div(spec.pooled_height * spec.pooled_width, BINS_PER_PROGRAM)
    with on_device_of(boxes):
        _roi_align_forward_kernel[(len(boxes) * bin_blocks, ceil_div(channels, block))](
            tuple(feature.contiguous(memory_format=torch.channels_last) for feature in features),
            boxes.contiguous(),
            output,
            argmax,
            tuple(pack_size(*feature.shape[2:]) for feature in features),
            features[0].shape[0],
            spec.scale_bits(),
            C=channels,
            PH=spec.pooled_height,
            PW=spec.pooled_width,
            RATIO=max(spec.sampling_ratio, 0),
            ALIGNED=spec.aligned,
            REDUCTION=spec.reduction,
            THRESHOLDS=spec.thresholds(boxes.dtype),
            CHANNELS_LAST=not output.is_contiguous(),
            COMPUTE=triton_dtype(output.dtype),
            BINS=BINS_PER_PROGRAM,
            CHANNELS=block,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return output, argmax
