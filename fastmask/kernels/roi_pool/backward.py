"""Gradient of RoIPool: to the pixel that won each bin.

    grad_input[n, c, y, x] = sum over RoIs k of image n and bins (p, q) with argmax[k, c, p, q] = y * W + x
                             of grad[k, c, p, q]

Each program owns a tile of pixels, finds the RoIs that touch it and adds their gradients in the order of RoIs,
then bins: the order of torchvision's loop on the CPU, to the bit. That needs no atomics, no sort and no list
in memory, and each gradient is written once, zeros included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._rois import image_indices
from fastmask.kernels._runtime import (
    compute_dtype,
    empty,
    float64_bits,
    jit,
    on_device_of,
    register,
    tl,
    triton,
    triton_dtype,
)
from fastmask.kernels.roi_pool.geometry import bin_edges, pixel_table, windows

REFERENCE_VALUES = 1 << 20  # gradients that the reference spreads at a time: some 12 MB
# Chosen by compiling: no spills but five of float64 on gfx942. Not yet measured on a GPU. Programs are one warp, whose
# threads hold all pixels of their channels: no row of gradients passes through shared memory.
TILE_SIDE = 4  # a larger tile compares each gradient with more pixels
CHANNELS_PER_PROGRAM = 64
BOXES_PER_STEP = 64
BINS_IN_FLIGHT = 4


def _winners(argmax: Tensor, image: Tensor, pixels: int) -> Tensor:
    """Rows of the pixel table that argmax names, int64 `[K * PH * PW, C]`."""
    return (argmax.permute(0, 2, 3, 1) + (image * (pixels + 1) + 1)[:, None, None, None]).flatten(0, 2)


def roi_pool_backward_reference(
    grad: Tensor,
    boxes: Tensor,
    argmax: Tensor,
    size: Sequence[int],
    spatial_scale: float,
    channels_last: bool,
) -> Tensor:
    """Add each gradient to its winner's row; on the CPU `scatter_add_` keeps the order of RoIs and bins."""
    del spatial_scale  # argmax tells; the kernel needs it to find the RoIs that touch a tile
    num_images, channels, height, width = size
    image = image_indices(boxes, num_images)
    table = grad.new_zeros(num_images, height * width + 1, channels, dtype=compute_dtype(grad.dtype))
    step = max(1, REFERENCE_VALUES // max(1, grad[:1].numel()))
    for begin in range(0, len(grad), step):
        k = slice(begin, begin + step)
        values = grad[k].permute(0, 2, 3, 1).to(table.dtype).flatten(0, 2)
        table.flatten(0, 1).scatter_add_(0, _winners(argmax[k], image[k], height * width), values)
    pixels = table[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return empty(grad, size, channels_last).copy_(pixels)


@jit()
def _bins_touching(begin, end, start, bin_size, POOLED: tl.constexpr):
    """Range of the bins that reach into pixels begin to end - 1; at a rounding's edge one bin too many."""
    slack: tl.constexpr = 1e-6 * POOLED
    low = tl.floor((begin - start).to(bin_size.dtype) / bin_size - slack)
    high = tl.ceil((end - start).to(bin_size.dtype) / bin_size + slack)
    low = tl.minimum(tl.maximum(low, 0.0), POOLED)
    return low.to(tl.int32), tl.minimum(tl.maximum(high, 0.0), POOLED).to(tl.int32)


@jit(do_not_specialize=["num_boxes", "num_images", "height", "width", "scale_bits"])
def _roi_pool_backward_kernel(
    grad,  # [K, PH, PW, C]
    argmax,  # [K, PH, PW, C] int32
    boxes,  # [K, 5]
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
    SIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BOXES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    tiles_x = tl.cdiv(width, SIDE)
    tiles = tl.cdiv(height, SIDE) * tiles_x
    this_image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    top, left = tile // tiles_x * SIDE, tile % tiles_x * SIDE
    y = top + tl.arange(0, SIDE * SIDE) // SIDE
    x = left + tl.arange(0, SIDE * SIDE) % SIDE
    pixel = y * width + x
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)

    sums = tl.zeros((SIDE * SIDE, BLOCK_C), COMPUTE)
    lane = tl.arange(0, BOXES)
    for first in range(0, num_boxes, BOXES):
        images, lefts, tops, widths, heights = windows(
            boxes, first + lane, num_boxes, num_images, scale_bits, PH, PW, COMPUTE
        )
        y_first = bin_edges(tl.zeros_like(lane), tops, heights, height)[0]
        x_first = bin_edges(tl.zeros_like(lane), lefts, widths, width)[0]
        y_end = bin_edges(tl.zeros_like(lane) + (PH - 1), tops, heights, height)[1]
        x_end = bin_edges(tl.zeros_like(lane) + (PW - 1), lefts, widths, width)[1]
        touches = (images == this_image) & (y_first < top + SIDE) & (y_end > top)
        touches = touches & (x_first < left + SIDE) & (x_end > left)
        waiting = tl.where(touches, lane, BOXES)
        nearest = tl.min(waiting, 0)
        while nearest < BOXES:
            k = first + nearest
            _, x1, y1, bin_width, bin_height = windows(boxes, k, num_boxes, num_images, scale_bits, PH, PW, COMPUTE)
            ph, ph_end = _bins_touching(top, top + SIDE, y1, bin_height, PH)
            pw, pw_end = _bins_touching(left, left + SIDE, x1, bin_width, PW)
            columns = pw_end - pw
            count = (ph_end - ph) * columns
            for start in range(0, count, UNROLL):
                for i in tl.static_range(UNROLL):  # so that several rows are on their way at once
                    nth = (ph + (start + i) // columns) * PW + pw + (start + i) % columns
                    row = (k.to(tl.int64) * (PH * PW) + nth) * C + c[None, :]
                    wanted = (start + i < count) & (c < C)[None, :]
                    value = tl.load(grad + row, mask=wanted, other=0.0).to(COMPUTE)
                    winner = tl.load(argmax + row, mask=wanted, other=-1)
                    sums += tl.where(winner == pixel[:, None], value, 0.0)
            waiting = tl.where(lane == nearest, BOXES, waiting)
            nearest = tl.min(waiting, 0)

    exists = ((y < height) & (x < width))[:, None] & (c < C)[None, :]
    grad_input += this_image.to(tl.int64) * height * width * C
    result = sums.to(grad_input.dtype.element_ty)
    if CHANNELS_LAST:
        tl.store(grad_input + pixel.to(tl.int64)[:, None] * C + c[None, :], result, mask=exists)
    else:
        plane = c.to(tl.int64)[None, :] * height * width
        tl.store(grad_input + plane + pixel[:, None], result, mask=exists)


def _launch_roi_pool_backward(
    grad: Tensor,
    boxes: Tensor,
    argmax: Tensor,
    size: Sequence[int],
    spatial_scale: float,
    channels_last: bool,
) -> Tensor:
    grad_input = empty(grad, size, channels_last)
    if grad_input.numel():
        num_images, channels, height, width = size
        block = min(CHANNELS_PER_PROGRAM, triton.next_power_of_2(channels))
        tiles = triton.cdiv(height, TILE_SIDE) * triton.cdiv(width, TILE_SIDE)
        sizes = len(boxes), num_images, height, width, float64_bits(spatial_scale)
        constants = channels, *grad.shape[2:], channels_last, triton_dtype(grad.dtype)
        grad, argmax = (t.contiguous(memory_format=torch.channels_last) for t in (grad, argmax))
        tuning = TILE_SIDE, block, BOXES_PER_STEP, BINS_IN_FLIGHT
        with on_device_of(grad):
            _roi_pool_backward_kernel[(num_images * tiles, triton.cdiv(channels, block))](
                grad,
                argmax,
                boxes.contiguous(),
                grad_input,
                *sizes,
                *constants,
                *tuning,
                enable_fp_fusion=False,
                num_warps=1,
            )
    return grad_input


def _fake_roi_pool_backward(
    grad: Tensor,
    boxes: Tensor,
    argmax: Tensor,
    size: Sequence[int],
    spatial_scale: float,
    channels_last: bool,
) -> Tensor:
    del boxes, argmax, spatial_scale
    return empty(grad, size, channels_last)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[1:3])


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward is linear in its gradient: what it has added to a winner comes back from there."""
    boxes, argmax = ctx.saved_tensors
    num_images, _, height, width = grad.shape
    image = boxes[:, 0].nan_to_num(0).clamp(0, num_images - 1).long()  # of no image: argmax is -1 throughout
    table = pixel_table(grad.permute(0, 2, 3, 1), 0.0)
    rows = table.gather(0, _winners(argmax, image, height * width))
    grad_grad = rows.unflatten(0, (len(argmax), *argmax.shape[2:])).permute(0, 3, 1, 2)
    return grad_grad, None, None, None, None, None


roi_pool_backward = register(
    "roi_pool_backward(Tensor grad, Tensor boxes, Tensor argmax, SymInt[] size, float spatial_scale,"
    " bool channels_last) -> Tensor",
    reference=roi_pool_backward_reference,
    launch=_launch_roi_pool_backward,
    fake=_fake_roi_pool_backward,
    backward=_double_backward,
    setup_context=_save_for_double_backward,
)
