"""Gradient of RoIPool: to the pixel that won each bin.

    grad_input[n, c, y, x] = sum over RoIs k of image n and bins (p, q) with argmax[k, c, p, q] = y * W + x
                             of grad[k, c, p, q]

Each program owns a tile of pixels, finds the RoIs that touch it and adds their gradients in the order of RoIs,
then bins: the order of torchvision's loop on the CPU, to the bit. That needs no atomics, no sort and no list
in memory, and each gradient is written once, zeros included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._runtime import (
    ceil_div,
    empty,
    float64_bits,
    jit,
    next_power_of_2,
    on_device_of,
    tl,
    triton_dtype,
)
from fastmask.kernels.roi_pool.geometry import bin_edges, windows

if TYPE_CHECKING:
    from fastmask.kernels.roi_pool.op import RoIPoolSpec

# Chosen by compiling: no spills but five of float64 on gfx942. Not yet measured on a GPU. Programs are one warp, whose
# threads hold all pixels of their channels: no row of gradients passes through shared memory.
TILE = 4  # a larger tile compares each gradient with more pixels
CHANNELS_PER_PROGRAM = 64
BOXES_PER_STEP = 64
BINS_IN_FLIGHT = 4


@jit()
def _bins_touching(begin, end, start, bin_size, POOLED: tl.constexpr):
    """Range of the bins that reach into pixels begin to end - 1; at a rounding's edge one bin too many."""
    SLACK: tl.constexpr = 1e-6 * POOLED
    low = tl.floor((begin - start).to(bin_size.dtype) / bin_size - SLACK)
    high = tl.ceil((end - start).to(bin_size.dtype) / bin_size + SLACK)
    low = tl.minimum(tl.maximum(low, 0.0), POOLED)
    return low.to(tl.int32), tl.minimum(tl.maximum(high, 0.0), POOLED).to(tl.int32)


@jit(do_not_specialize=["num_boxes", "num_images", "height", "width", "scale_bits"])
def _roi_pool_backward_kernel(
    grad,  # [K, PH, PW, C]
    argmax,  # [K, PH, PW, C] int32
    boxes,  # [K, 5] of COMPUTE
    grad_input,  # [N, C, H, W] in either layout
    num_boxes,
    num_images,
    height,
    width,
    scale_bits,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # grad_input
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
):
    tiles_x = tl.cdiv(width, TILE)
    tiles = tl.cdiv(height, TILE) * tiles_x
    this_image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    top, left = tile // tiles_x * TILE, tile % tiles_x * TILE
    y = top + tl.arange(0, TILE * TILE) // TILE
    x = left + tl.arange(0, TILE * TILE) % TILE
    pixel = y * width + x
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)

    sums = tl.zeros((TILE * TILE, CHANNELS), COMPUTE)
    lane = tl.arange(0, STEP)
    for first in range(0, num_boxes, STEP):
        images, lefts, tops, widths, heights = windows(
            boxes, first + lane, num_boxes, num_images, scale_bits, PH, PW, COMPUTE
        )
        y_first = bin_edges(tl.zeros_like(lane), tops, heights, height)[0]
        x_first = bin_edges(tl.zeros_like(lane), lefts, widths, width)[0]
        y_end = bin_edges(tl.zeros_like(lane) + (PH - 1), tops, heights, height)[1]
        x_end = bin_edges(tl.zeros_like(lane) + (PW - 1), lefts, widths, width)[1]
        touches = (images == this_image) & (y_first < top + TILE) & (y_end > top)
        touches = touches & (x_first < left + TILE) & (x_end > left)
        pending = tl.where(touches, lane, STEP)
        nearest = tl.min(pending, 0)
        while nearest < STEP:
            k = first + nearest
            _, x1, y1, bin_width, bin_height = windows(boxes, k, num_boxes, num_images, scale_bits, PH, PW, COMPUTE)
            ph, ph_end = _bins_touching(top, top + TILE, y1, bin_height, PH)
            pw, pw_end = _bins_touching(left, left + TILE, x1, bin_width, PW)
            columns = pw_end - pw
            count = (ph_end - ph) * columns
            for start in range(0, count, UNROLL):
                for i in tl.static_range(UNROLL):  # keeps several loads in flight
                    nth = (ph + (start + i) // columns) * PW + pw + (start + i) % columns
                    row = (k.to(tl.int64) * (PH * PW) + nth) * C + channel[None, :]
                    valid = (start + i < count) & (channel < C)[None, :]
                    value = tl.load(grad + row, mask=valid, other=0.0).to(COMPUTE)
                    winner = tl.load(argmax + row, mask=valid, other=-1)
                    sums += tl.where(winner == pixel[:, None], value, 0.0)
            pending = tl.where(lane == nearest, STEP, pending)
            nearest = tl.min(pending, 0)

    exists = ((y < height) & (x < width))[:, None] & (channel < C)[None, :]
    grad_input += this_image.to(tl.int64) * height * width * C
    result = sums.to(grad_input.dtype.element_ty)
    if CHANNELS_LAST:
        tl.store(grad_input + pixel.to(tl.int64)[:, None] * C + channel[None, :], result, mask=exists)
    else:
        plane = channel.to(tl.int64)[None, :] * height * width
        tl.store(grad_input + plane + pixel[:, None], result, mask=exists)


def launch_roi_pool_backward(
    grad: Tensor, boxes: Tensor, argmax: Tensor, size: Sequence[int], channels_last: bool, spec: RoIPoolSpec
) -> Tensor:
    """Gradient of the input."""
    grad_input = empty(grad, size, channels_last)
    if not grad_input.numel():
        return grad_input
    num_images, channels, height, width = size
    block = min(CHANNELS_PER_PROGRAM, next_power_of_2(channels))
    tiles = ceil_div(height, TILE) * ceil_div(width, TILE)
    with on_device_of(grad):
        _roi_pool_backward_kernel[(num_images * tiles, ceil_div(channels, block))](
            grad.contiguous(memory_format=torch.channels_last),
            argmax.contiguous(memory_format=torch.channels_last),
            boxes.contiguous(),
            grad_input,
            len(boxes),
            num_images,
            height,
            width,
            float64_bits(spec.spatial_scale),
            C=channels,
            PH=spec.pooled_height,
            PW=spec.pooled_width,
            CHANNELS_LAST=channels_last,
            COMPUTE=triton_dtype(grad.dtype),
            TILE=TILE,
            CHANNELS=block,
            STEP=BOXES_PER_STEP,
            UNROLL=BINS_IN_FLIGHT,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return grad_input
