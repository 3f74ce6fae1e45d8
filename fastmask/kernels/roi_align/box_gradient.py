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
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

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
from fastmask.kernels.roi_align.geometry import axis_of, finite_box, level_of, position_of, scaled_box, size_of

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import RoIAlignSpec

BINS_PER_PROGRAM = 4
CHANNELS_PER_PROGRAM = {2: 256, 4: 256, 8: 64}  # by the bytes of an element
NUM_WARPS = 4


@jit()
def _tap(axis, p, sample, spans, BINS: tl.constexpr):
    """Of a visited sample of bins `p`: low and high neighbour, their weights, slope and share of the end of the box.

    The slope is the derivative of the high neighbour's weight with respect to the position.
    """
    position, inside = position_of(axis, sample)
    inside &= sample < axis.visited
    low = tl.minimum(position.to(tl.int32), axis.extent - 1)
    high = tl.minimum(low + 1, axis.extent - 1)
    fraction = position - low
    # An approximate quotient: a share decides nothing.
    share = (p + (axis.skipped + sample + 0.5) / tl.maximum(axis.grid, 1.0)) * (1.0 / BINS)
    slope = inside & (position > 0) & (high > low)
    return (
        low,
        high,
        tl.where(inside, 1 - fraction, 0.0),
        tl.where(inside, fraction, 0.0),
        tl.where(slope, 1.0, 0.0).to(position.dtype),
        tl.where(spans, share, 0.0),
    )


@jit()
def _load_pixels(feature, row, column, width, channel, mask, C: tl.constexpr, COMPUTE: tl.constexpr):
    """Features `[bins, channels]` at one pixel for each bin."""
    pixel = feature + (row.to(tl.int64) * width + column)[:, None] * C + channel[None, :]
    loaded = tl.load(pixel) if mask is None else tl.load(pixel, mask=mask[None, :], other=0.0)
    return loaded.to(COMPUTE)


@jit()
def _derivatives(feature, y, x, width, channel, mask, C: tl.constexpr, COMPUTE: tl.constexpr):
    """Derivatives `[bins, channels]` of the interpolated values with respect to y and x; both are from `_tap`."""
    low_low = _load_pixels(feature, y[0], x[0], width, channel, mask, C, COMPUTE)
    low_high = _load_pixels(feature, y[0], x[1], width, channel, mask, C, COMPUTE)
    high_low = _load_pixels(feature, y[1], x[0], width, channel, mask, C, COMPUTE)
    high_high = _load_pixels(feature, y[1], x[1], width, channel, mask, C, COMPUTE)
    y_low, y_high = (y[4] * x[2])[:, None], (y[4] * x[3])[:, None]
    x_low, x_high = (x[4] * y[2])[:, None], (x[4] * y[3])[:, None]
    of_y = tl.fma(high_high - low_high, y_high, (high_low - low_low) * y_low)
    of_x = tl.fma(high_high - high_low, x_high, (low_high - low_low) * x_low)
    return of_y, of_x


@jit()
def _add_sample(sums, of_y, of_x, y, x):
    """Add the derivatives of a sample with respect to y and x to those with respect to x1, y1, x2 and y2."""
    return (
        tl.fma(of_x, (1 - x[5])[:, None], sums[0]),
        tl.fma(of_y, (1 - y[5])[:, None], sums[1]),
        tl.fma(of_x, x[5][:, None], sums[2]),
        tl.fma(of_y, y[5][:, None], sums[3]),
    )


@jit(do_not_specialize=["num_images"])
def _roi_align_box_backward_kernel(
    grad,  # [K, PH * PW, C]
    features,  # L of [N, H_l, W_l, C]
    boxes,  # [K, 5] of COMPUTE
    argmax,  # [K, PH * PW, C] int32; read for the maximum only
    partial,  # [K, blocks of bins, blocks of channels, 4] of COMPUTE: sums of x1, y1, x2, y2
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

    zero = tl.zeros((BINS, CHANNELS), COMPUTE)
    sums = (zero, zero, zero, zero)
    x1, y1, x2, y2 = scaled_box(box, scale, ALIGNED)
    place = k * (PH * PW * C) + (bin * C)[:, None] + channel[None, :]
    loaded = (bin < PH * PW)[:, None] if mask is None else (bin < PH * PW)[:, None] & mask[None, :]
    grad_bin = zero
    if pooled & finite_box(x1, y1, x2, y2) & (height > 0) & (width > 0):
        grad_bin = tl.load(grad + place, mask=loaded, other=0.0).to(COMPUTE)
        if REDUCTION == "max":
            winner = tl.load(argmax + place, mask=loaded, other=0)
        p, q = (bin // PW).to(COMPUTE), (bin % PW).to(COMPUTE)
        rows = axis_of(y1, y2, p, height, PH, RATIO, ALIGNED)
        columns = axis_of(x1, x2, q, width, PW, RATIO, ALIGNED)
        for i in range(tl.max(rows.visited, 0).to(tl.int32)):
            y = _tap(rows, p, i, ALIGNED | (y2 - y1 >= 1), PH)
            for j in range(tl.max(columns.visited, 0).to(tl.int32)):
                x = _tap(columns, q, j, ALIGNED | (x2 - x1 >= 1), PW)
                of_y, of_x = _derivatives(feature, y, x, width, channel, mask, C, COMPUTE)
                if REDUCTION == "max":
                    won = winner == (i * columns.visited.to(tl.int32) + j)[:, None]
                    of_y, of_x = tl.where(won, of_y, 0.0), tl.where(won, of_x, 0.0)
                sums = _add_sample(sums, of_y, of_x, y, x)
        if REDUCTION == "mean":
            grad_bin = divide(grad_bin, tl.maximum(rows.grid * columns.grid, 1.0)[:, None])

    partial += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 4
    for corner in tl.static_range(4):
        tl.store(partial + corner, tl.sum(tl.sum(sums[corner] * grad_bin, 1), 0) * scale)


def launch_roi_align_box_backward(
    grad: Tensor, features: Sequence[Tensor], boxes: Tensor, argmax: Tensor, spec: RoIAlignSpec
) -> Tensor:
    """Gradients of the boxes, `[K, 5]`."""
    channels = grad.shape[1]
    if not grad.numel():
        return boxes.new_zeros(boxes.shape)
    block = min(CHANNELS_PER_PROGRAM[grad.element_size()], next_power_of_2(channels))
    bin_blocks = ceil_div(spec.pooled_height * spec.pooled_width, BINS_PER_PROGRAM)
    channel_blocks = ceil_div(channels, block)
    partial = boxes.new_empty(len(boxes), bin_blocks * channel_blocks, 4)
    with on_device_of(boxes):
        _roi_align_box_backward_kernel[(len(boxes) * bin_blocks, channel_blocks)](
            grad.contiguous(memory_format=torch.channels_last),
            tuple(feature.contiguous(memory_format=torch.channels_last) for feature in features),
            boxes.contiguous(),
            argmax.contiguous(memory_format=torch.channels_last),
            partial,
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
            COMPUTE=triton_dtype(grad.dtype),
            BINS=BINS_PER_PROGRAM,
            CHANNELS=block,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return pad(partial.sum(1), (1, 0))
