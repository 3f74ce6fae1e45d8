"""Gradient of RoIAlign with respect to the boxes, computed only where boxes require grad.

    grad_y[s]    = sum over channels c of grad[k, c, p, q] * (F[high, x] - F[low, x])[c]       x likewise
    grad_y1[k]   = scale * sum over the samples s of box k of grad_y[s] * (1 - t(s))
    grad_y2[k]   = scale * sum over the samples s of box k of grad_y[s] * t(s)
    t(s)         = (p + (i + 1/2) / g) / P            the share of the box's size before sample i of bin p

F[low, x] and F[high, x] are a sample's rows of neighbours, interpolated along x. The mean divides grad by the number of
samples of a bin; the maximum takes the sample that won. Positions are piecewise smooth in the corners. The level of a
box, its image (column 0) and the number of samples of an adaptive grid have gradient 0. Where `aligned` is off and a
size below 1 is raised to 1, the position moves with the start of the box alone: t = 0.

The bilinear value has kinks at pixel centres. Its derivative there is the one towards larger coordinates, and 0 where
the position is at the border's pixel centres or beyond, as in `grid_sample(padding_mode="border")`.

A program sums a block of bins and channels of one box, and a second sum adds the blocks of a box. Both have a fixed
order: same inputs, same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    ceil_div,
    float_of,
    jit,
    next_power_of_2,
    on_device_of,
    tl,
    triton_dtype,
)
from fastmask.kernels.roi_align.geometry import axis_of, finite_box, level_of, position_of, scaled_box, size_of
from fastmask.kernels.roi_align.levels import pyramid_numbers

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import RoIAlignSpec

# [bins x channels] of a program. Chosen by compiling, see docs/compile_report.md: a thread holds 16 bytes of each of
# the four pixels, in 72 registers for the mean and 96 for the maximum (bfloat16, sm_90). With 8 bins the mean needs
# 128 and the maximum 168. Not yet measured on a GPU.
BINS_PER_PROGRAM = 4
CHANNELS_PER_PROGRAM = {2: 256, 4: 256, 8: 64}  # by the bytes of an element
NUM_WARPS = 4


class Tap(NamedTuple):
    """Where a sample of each bin reads along one axis."""

    low: Any  # neighbour
    high: Any  # neighbour, also low at the border
    weight_low: Any  # 0 where there is no such sample, or it is outside
    weight_high: Any
    slope: Any  # derivative of weight_high with respect to the position, 1 or 0
    share: Any  # derivative of the position with respect to the end of the box; 1 minus it is that of the start


@jit()
def _tap(axis, p, sample, resizes, BINS: tl.constexpr):
    """The `Tap` of a sample of bins `p` of a box whose bins change in size with its corners, or do not."""
    position, inside = position_of(axis, sample)
    inside &= sample < axis.visited
    low = tl.minimum(position.to(tl.int32), axis.extent - 1)
    high = tl.minimum(low + 1, axis.extent - 1)
    fraction = position - low
    moves = inside & (position > 0) & (high > low)
    # An approximate quotient is enough: unlike a position, a share selects nothing.
    share = (p + (axis.skipped + sample + 0.5) / tl.maximum(axis.grid, 1.0)) * (1.0 / BINS)
    return Tap(
        low,
        high,
        tl.where(inside, 1 - fraction, 0.0),
        tl.where(inside, fraction, 0.0),
        tl.where(moves, 1.0, 0.0).to(fraction.dtype),
        tl.where(resizes, share, 0.0),
    )


@jit()
def _load_pixels(feature, row, column, width, channel, mask, C: tl.constexpr, COMPUTE: tl.constexpr):
    """Features `[bins, channels]` at one pixel for each bin."""
    pixel = feature + (row.to(tl.int64) * width + column)[:, None] * C + channel[None, :]
    loaded = tl.load(pixel) if mask is None else tl.load(pixel, mask=mask[None, :], other=0.0)
    return loaded.to(COMPUTE)


@jit()
def _dot(values, grad, VECTOR: tl.constexpr):
    """Sums `[bins, channels / VECTOR]` of products: over the channels that a thread holds, so without shuffles."""
    products = tl.reshape(values * grad, (grad.shape[0], grad.shape[1] // VECTOR, VECTOR))
    return tl.sum(products, 2)


@jit()
def _sample_gradients(
    feature, grad, y, x, width, channel, mask, C: tl.constexpr, COMPUTE: tl.constexpr, VECTOR: tl.constexpr
):
    """Gradients `[bins, channels / VECTOR]` of the positions of a sample of each bin, y and x, at its taps y and x."""
    low_low = _load_pixels(feature, y.low, x.low, width, channel, mask, C, COMPUTE)
    low_high = _load_pixels(feature, y.low, x.high, width, channel, mask, C, COMPUTE)
    high_low = _load_pixels(feature, y.high, x.low, width, channel, mask, C, COMPUTE)
    high_high = _load_pixels(feature, y.high, x.high, width, channel, mask, C, COMPUTE)
    of_y = tl.fma(high_high - low_high, x.weight_high[:, None], (high_low - low_low) * x.weight_low[:, None])
    of_x = tl.fma(high_high - high_low, y.weight_high[:, None], (low_high - low_low) * y.weight_low[:, None])
    return _dot(of_y, grad, VECTOR) * y.slope[:, None], _dot(of_x, grad, VECTOR) * x.slope[:, None]


@jit()
def _add_sample(sums, grad_y, grad_x, y, x):
    """Add the gradients of a sample's y and x to those of x1, y1, x2 and y2."""
    return (
        tl.fma(grad_x, (1 - x.share)[:, None], sums[0]),
        tl.fma(grad_y, (1 - y.share)[:, None], sums[1]),
        tl.fma(grad_x, x.share[:, None], sums[2]),
        tl.fma(grad_y, y.share[:, None], sums[3]),
    )


@jit(do_not_specialize=["num_images"])
def _roi_align_box_backward_kernel(
    grad,  # [K, PH * PW, C]
    features,  # L of [N, H_l, W_l, C]
    boxes,  # [K, 5] of COMPUTE
    argmax,  # [K, PH * PW, C] int32; read for the maximum only
    partial,  # [K, blocks of bins, blocks of channels, 5] of COMPUTE: 0, and sums of x1, y1, x2, y2
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
    COMPUTE: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,  # channels of 16 bytes
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
    scale = float_of(scale, COMPUTE)
    height, width = size_of(packed)
    feature += image * height * width * C

    zero = tl.zeros((BINS, CHANNELS // VECTOR), COMPUTE)
    sums = (zero, zero, zero, zero)
    x1, y1, x2, y2 = scaled_box(box, scale, ALIGNED)
    if pooled & finite_box(x1, y1, x2, y2) & (height > 0) & (width > 0):
        place = k * (PH * PW * C) + (bin * C)[:, None] + channel[None, :]
        loaded = (bin < PH * PW)[:, None] if mask is None else (bin < PH * PW)[:, None] & mask[None, :]
        grad_bin = tl.load(grad + place, mask=loaded, other=0.0).to(COMPUTE)
        p, q = (bin // PW).to(COMPUTE), (bin % PW).to(COMPUTE)
        rows = axis_of(y1, y2, p, height, PH, RATIO, ALIGNED)
        columns = axis_of(x1, x2, q, width, PW, RATIO, ALIGNED)
        winner = tl.load(argmax + place, mask=loaded, other=0) if REDUCTION == "max" else None
        if REDUCTION == "mean":
            grad_bin *= (1.0 / tl.maximum(rows.grid * columns.grid, 1.0))[:, None]
        for i in range(tl.max(rows.visited, 0).to(tl.int32)):
            y = _tap(rows, p, i, ALIGNED | (y2 - y1 >= 1), PH)
            for j in range(tl.max(columns.visited, 0).to(tl.int32)):
                x = _tap(columns, q, j, ALIGNED | (x2 - x1 >= 1), PW)
                grad_sample = grad_bin
                if REDUCTION == "max":
                    sample = i * columns.visited.to(tl.int32) + j
                    grad_sample = tl.where(winner == sample[:, None], grad_bin, 0.0)
                grad_y, grad_x = _sample_gradients(feature, grad_sample, y, x, width, channel, mask, C, COMPUTE, VECTOR)
                sums = _add_sample(sums, grad_y, grad_x, y, x)

    partial += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 5
    tl.store(partial, 0.0)
    for corner in tl.static_range(4):
        tl.store(partial + 1 + corner, tl.sum(tl.sum(sums[corner], 1), 0) * scale)


@lru_cache(maxsize=1024)
def _prepared(
    spec: RoIAlignSpec, shapes: tuple[torch.Size, ...], dtype: torch.dtype, box_dtype: torch.dtype
) -> tuple[int, int, Launch]:
    """The blocks of bins, the blocks of channels, and the launch."""
    num_images, channels = shapes[0][:2]
    block = min(CHANNELS_PER_PROGRAM[dtype.itemsize], next_power_of_2(channels))
    launch = Launch(
        _roi_align_box_backward_kernel,
        *pyramid_numbers(spec, num_images, [(height, width) for _, _, height, width in shapes]),
        C=channels,
        PH=spec.pooled_height,
        PW=spec.pooled_width,
        RATIO=max(spec.sampling_ratio, 0),
        ALIGNED=spec.aligned,
        REDUCTION=spec.reduction,
        THRESHOLDS=spec.thresholds(box_dtype),
        COMPUTE=triton_dtype(dtype),
        BINS=BINS_PER_PROGRAM,
        CHANNELS=block,
        VECTOR=min(block, 16 // dtype.itemsize),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return ceil_div(spec.pooled_height * spec.pooled_width, BINS_PER_PROGRAM), ceil_div(channels, block), launch


def launch_roi_align_box_backward(
    grad: Tensor, features: Sequence[Tensor], boxes: Tensor, argmax: Tensor, spec: RoIAlignSpec
) -> Tensor:
    """Gradients of the boxes, `[K, 5]`."""
    if not grad.numel():
        return boxes.new_zeros(boxes.shape)
    shapes = tuple([feature.shape for feature in features])
    bin_blocks, channel_blocks, launch = _prepared(spec, shapes, grad.dtype, boxes.dtype)
    num_boxes = boxes.shape[0]
    partial = torch.empty((num_boxes, bin_blocks * channel_blocks, 5), dtype=boxes.dtype, device=boxes.device)
    with on_device_of(boxes):
        launch(
            (num_boxes * bin_blocks, channel_blocks),
            grad.contiguous(memory_format=torch.channels_last),
            tuple([feature.contiguous(memory_format=torch.channels_last) for feature in features]),
            boxes.contiguous(),
            argmax.contiguous(memory_format=torch.channels_last),
            partial,
        )
    return partial.sum(1)
