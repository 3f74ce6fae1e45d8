"""RoIPool: the largest feature in each bin of a RoI whose box is rounded to whole pixels.

    x1, y1, x2, y2 = round(box * spatial_scale)            halves away from zero, as C's round does
    width          = max(x2 - x1 + 1, 1)                   both ends are pixels of the RoI
    columns(pw)    = x1 + floor(pw * width / PW) up to x1 + ceil((pw + 1) * width / PW) - 1
    out[k, c, ph, pw] = max of input[image(k), c, y, x] over rows(ph), columns(pw), clipped to the map

and 0 for a bin that clipping leaves empty (Girshick 2015, §2.1; RoIAlign's rival in He et al. 2017, §3).

K RoIs, C channels, PH x PW bins, N x H x W the batch of feature maps. Boxes are `(x1, y1, x2, y2)` in image
pixels; rounding them to pixels of the map is the misalignment that RoIAlign removes. Box arithmetic is in
float32 (float64 for float64 features), operation for operation torchvision's, so the same pixels win: of
equals the first in row-major order, and never a NaN. `argmax` holds the winner's y * W + x, or -1.

Features are read as channels-last rows, 16 bytes a load, in their own precision; in NCHW each output would
gather scattered values of 2 to 4 bytes, and one transposing copy costs less.

Deterministic, the backward (`roi_pool_backward.py`) too.

RoIWarp, which the paper compares as well, rounds the box in the same way and then samples it bilinearly: RoIAlign
on a rounded box, and so RoIAlign's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._rois import checked_features, checked_output_size, checked_scales, image_indices, roi_format
from fastmask.kernels._runtime import (
    empty,
    float64_bits,
    is_channels_last,
    jit,
    on_device_of,
    register,
    tl,
    triton,
    triton_dtype,
)
from fastmask.kernels.roi_align import roi_align
from fastmask.kernels.roi_pool.backward import roi_pool_backward
from fastmask.kernels.roi_pool.geometry import bin_edges, bin_spans, pixel_table, quantise, windows

REFERENCE_PIXELS = 1 << 18  # of all bins that the reference lists at a time: some 20 MB
# Chosen by compiling: no spills on any architecture. Not yet measured on a GPU.
BINS_PER_PROGRAM = 8
CHANNELS_PER_PROGRAM = 256


def _lowest(dtype: torch.dtype) -> float:
    """Only features above it win. It is float32's lowest for float64 too, as in torchvision."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def _empty_results(input: Tensor, num_rois: int, pooled_height: int, pooled_width: int) -> tuple[Tensor, Tensor]:
    """Output in the input's layout, and argmax, which is channels-last always."""
    shape = num_rois, input.shape[1], pooled_height, pooled_width
    output = empty(input, shape, is_channels_last(input))
    return output, empty(input, shape, True, torch.int32)


def _runs(first: Tensor, count: Tensor, step: int = 1) -> Tensor:
    """Concatenate the runs `first[i], first[i] + step, ...` of `count[i]` numbers."""
    origin = torch.repeat_interleave(first - (count.cumsum(0) - count) * step, count)
    return origin + torch.arange(len(origin), device=first.device) * step


def roi_pool_reference(
    input: Tensor, boxes: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> tuple[Tensor, Tensor]:
    """Bins as bags of rows of a pixel table, of which `_embedding_bag` finds the largest."""
    num_images, channels, height, width = input.shape
    output, argmax = _empty_results(input, len(boxes), pooled_height, pooled_width)
    before = image_indices(boxes, num_images) * (height * width + 1)
    x1, y1, roi_width, roi_height = quantise(boxes, spatial_scale)
    top, rows = bin_spans(y1, roi_height, pooled_height, height, boxes.dtype)
    left, columns = bin_spans(x1, roi_width, pooled_width, width, boxes.dtype)
    corner = (before[:, None] + 1 + top * width)[:, :, None] + left[:, None, :]
    table = pixel_table(input.permute(0, 2, 3, 1), _lowest(input.dtype))
    index_dtype = torch.int32 if len(table) < 2**31 else torch.int64  # int32 takes two thirds of the time

    pixels = rows.sum(1) * columns.sum(1)
    _, counts = torch.unique_consecutive(pixels.cumsum(0) // REFERENCE_PIXELS, return_counts=True)
    for begin, end in pairwise([0, *counts.cumsum(0).tolist()]):
        k = slice(begin, end)
        none = before[k, None, None].expand_as(corner[k]).flatten()
        bin_columns = columns[k, None, :].expand_as(corner[k]).flatten()
        bin_rows = rows[k, :, None].expand_as(corner[k]).flatten()
        # A bag is pixel -1, then the bin's rows: a bag keeps its first row unless a later one is larger.
        runs = bin_rows + 1
        head = runs.cumsum(0) - runs
        start = _runs(corner[k].flatten() - width, runs, width)
        length = torch.repeat_interleave(bin_columns, runs)
        start[head], length[head] = none, 1
        members = _runs(start, length).to(index_dtype)
        offsets = (length.cumsum(0) - length)[head].to(index_dtype)
        largest, _, _, winner = torch.ops.aten._embedding_bag(table, members, offsets, mode=2)
        largest[bin_rows * bin_columns == 0] = 0
        winner -= (none + 1).to(index_dtype)[:, None]
        bins = (end - begin, pooled_height, pooled_width, channels)
        output[k] = largest.view(bins).permute(0, 3, 1, 2)
        argmax[k] = winner.view(bins).permute(0, 3, 1, 2)
    return output, argmax


@jit(do_not_specialize=["num_boxes", "num_images", "height", "width", "scale_bits"])
def _roi_pool_kernel(
    features,  # [N, H, W, C]
    boxes,  # [K, 5]
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
    BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (PH * PW + BINS - 1) // BINS
    k = tl.program_id(0) // blocks
    bins = tl.program_id(0) % blocks * BINS + tl.arange(0, BINS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, left, top, bin_width, bin_height = windows(boxes, k, num_boxes, num_images, scale_bits, PH, PW, COMPUTE)
    y0, y1 = bin_edges(bins // PW, top, bin_height, height)
    x0, x1 = bin_edges(bins % PW, left, bin_width, width)
    y1 = tl.where(bins < PH * PW, y1, y0)  # bins that do not exist are empty

    features += image.to(tl.int64) * height * width * C
    best = tl.full((BINS, BLOCK_C), LOWEST, COMPUTE)
    winner = tl.full((BINS, BLOCK_C), -1, tl.int32)
    for i in range(tl.max(y1 - y0, 0)):
        for j in range(tl.max(x1 - x0, 0)):
            y, x = y0 + i, x0 + j
            pixel = y * width + x
            inside = ((y < y1) & (x < x1))[:, None] & (c < C)[None, :]
            row = features + pixel.to(tl.int64)[:, None] * C + c[None, :]
            value = tl.load(row, mask=inside, other=LOWEST).to(COMPUTE)
            larger = value > best  # False for NaN
            best = tl.where(larger, value, best)
            winner = tl.where(larger, pixel[:, None], winner)
    empty = (y0 >= y1) | (x0 >= x1)
    best = tl.where(empty[:, None], 0.0, best)

    exists = (bins < PH * PW)[:, None] & (c < C)[None, :]
    roi = k.to(tl.int64) * (PH * PW * C)
    rows = roi + bins[:, None] * C + c[None, :]
    tl.store(argmax + rows, winner, mask=exists)
    if CHANNELS_LAST:
        tl.store(output + rows, best.to(output.dtype.element_ty), mask=exists)
    else:
        columns = roi + bins[:, None] + c[None, :] * (PH * PW)
        tl.store(output + columns, best.to(output.dtype.element_ty), mask=exists)


def _launch_roi_pool(
    input: Tensor, boxes: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> tuple[Tensor, Tensor]:
    num_images, channels, height, width = input.shape
    output, argmax = _empty_results(input, len(boxes), pooled_height, pooled_width)
    if output.numel():
        block = min(CHANNELS_PER_PROGRAM, triton.next_power_of_2(channels))
        blocks = triton.cdiv(pooled_height * pooled_width, BINS_PER_PROGRAM)
        sizes = len(boxes), num_images, height, width, float64_bits(spatial_scale)
        constants = channels, pooled_height, pooled_width, is_channels_last(input), triton_dtype(input.dtype)
        rows = input.contiguous(memory_format=torch.channels_last)
        tuning = _lowest(input.dtype), BINS_PER_PROGRAM, block
        with on_device_of(input):
            _roi_pool_kernel[(len(boxes) * blocks, triton.cdiv(channels, block))](
                rows, boxes.contiguous(), output, argmax, *sizes, *constants, *tuning, enable_fp_fusion=False
            )
    return output, argmax


def _fake_roi_pool(
    input: Tensor, boxes: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> tuple[Tensor, Tensor]:
    del spatial_scale
    return _empty_results(input, boxes.shape[0], pooled_height, pooled_width)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, boxes, _, _, spatial_scale = inputs
    ctx.save_for_backward(boxes, output[1])
    ctx.arguments = features.shape, spatial_scale, is_channels_last(features)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return roi_pool_backward(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


_roi_pool = register(
    "roi_pool(Tensor input, Tensor boxes, SymInt pooled_height, SymInt pooled_width, float spatial_scale)"
    " -> (Tensor output, Tensor argmax)",
    reference=roi_pool_reference,
    launch=_launch_roi_pool,
    fake=_fake_roi_pool,
    backward=_backward,
    setup_context=_save_for_backward,
)


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """The largest feature in each bin of each RoI: `torchvision.ops.roi_pool`, in half precision too.

    Args:
        input: `[N, C, H, W]` feature maps: float16, bfloat16, float32 or float64. channels_last is fastest.
        boxes: `[K, 5]` rows `(batch index, x1, y1, x2, y2)` in image pixels, or one `[L, 4]` for each image.
            They are rounded to pixels of the map, both ends included. Their floating dtype may differ from
            `input`'s. A box with a coordinate that is not finite pools zeros.
        output_size: bins, `(height, width)` or one number for both.
        spatial_scale: pixels of the feature map per pixel of the image.

    Returns:
        `[K, C, *output_size]` in the input's dtype and memory format. A bin outside the map is 0; a bin of
        nothing above the dtype's lowest finite number (float32's for float64), NaN say, is that number.
        Neither has a gradient; other gradients go to `input` alone, to the first of equal features.

    Raises:
        ValueError: an argument has another shape, or a batch index lies outside `[0, N)`. An accelerator
            would have to be waited for to know the latter: there such a RoI pools zeros.
        TypeError: `input` or `boxes` has another dtype.
    """
    (input,) = checked_features([input], "input")
    if input.shape[2] * input.shape[3] >= 2**31:
        raise ValueError(f"input: expected fewer than 2^31 pixels per image, got {list(input.shape)}")
    pooled_height, pooled_width = checked_output_size(output_size)
    checked_scales([spatial_scale], 1, "spatial_scale")
    output, _ = _roi_pool(input, roi_format(boxes, input), pooled_height, pooled_width, spatial_scale)
    return output


def roi_warp(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    *,
    reduction: str = "mean",
) -> Tensor:
    """RoIWarp: boxes rounded to whole pixels as in RoIPool, then sampled bilinearly (He et al. 2017, §3, Table 2c).

    Args:
        input, boxes, output_size, spatial_scale: see `roi_pool`.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        reduction: `"mean"` or `"max"` of the samples of a bin.

    Returns:
        `[K, C, PH, PW]`, differentiable with respect to `input`; deterministic. Errors as for `roi_align`.
    """
    (input,) = checked_features([input], "input")
    checked_scales([spatial_scale], 1, "spatial_scale")
    rois = roi_format(boxes, input)
    x1, y1, width, height = (edge.to(rois.dtype) for edge in quantise(rois, spatial_scale))
    # A box that is not finite has size 0 here, and must not become one that is.
    rounded = torch.stack([rois[:, 0], x1, y1, (x1 + width).where(width > 0, torch.nan), y1 + height], 1)
    return roi_align(input, rounded, output_size, 1.0, sampling_ratio, reduction=reduction)
