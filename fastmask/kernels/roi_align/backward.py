"""Gradient of RoIAlign with respect to the features, without atomics: every pixel sums the gradients of its bins.

    grad_features[l][n, c, y, x] = sum over boxes k of level l and image n, and over bins (p, q)
                                   of Wy[k, y, p] * Wx[k, x, q] * grad[k, c, p, q]

The mean over a bin's samples is separable: Wy[k, y, p] is the total weight, over the samples of row p, of feature
row y, divided by their number. A program owns a tile of TILE x TILE pixels and a block of channels of one image and
level; a small kernel before it lists the boxes that reach each tile, in order. For each box the program forms the
[pixels x bins] matrix of weights and adds its product with the [bins x channels] gradient.

Each gradient element is written once, in the features' precision, zeros included: no float32 copy of the
pyramid to zero, to add to and to cast (112 us of memory time on an H200 for the 45.7 MB pyramid of an 800 x 1344
image, against 27 us). Sums are float32 in the order of the boxes: same inputs, same bits. float16 and bfloat16
weights are rounded to that precision for the tensor cores; the products are exact and summed in float32.

The gradient of the maximum goes to the sample that won; there the weights depend on the channel, and the
product becomes a loop over the bins that reach the tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._runtime import (
    INTERPRETED,
    ceil_div,
    divide,
    float_of,
    jit,
    next_power_of_2,
    on_device_of,
    target_backend,
    tl,
    triton,
    triton_dtype,
)
from fastmask.kernels.roi_align.geometry import axis_of, finite_box, level_of, position_of, scaled_box, size_of

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import PyramidShape, RoIAlignSpec

# Chosen by compiling, see docs/compile_report.md: 64 pixels x 64 channels of float32 sums in 4 warps leave room
# for the weights without spills. Not yet measured on a GPU.
TILE = 8
CHANNELS_PER_PROGRAM = {2: 64, 4: 32, 8: 32}  # by the bytes of an element
BINS_PER_PRODUCT = 64
BOXES_PER_STEP = 128
# Entries of the lists of boxes, of all tiles together, in one pair of launches; more tiles take several pairs.
MAX_LIST_ENTRIES = 1 << 25
NUM_WARPS = 4
NUM_WARPS_ADAPTIVE = 8  # for an adaptive grid and several products per box: with 4, sm_100 spills
NUM_STAGES = 3


@jit()
def _tile(tile, sizes, num_images, TILE: tl.constexpr):
    """Level, image, first row and column of a tile, and height and width of its level."""
    level, packed, start, end = 0, sizes[0], 0, 0
    for finer in tl.static_range(len(sizes) - 1):
        height, width = size_of(sizes[finer])
        next_start = end + tl.cdiv(height, TILE) * tl.cdiv(width, TILE) * num_images
        if tile >= next_start:
            level, packed, start = finer + 1, sizes[finer + 1], next_start
        end = next_start
    height, width = size_of(packed)
    rows, columns = tl.cdiv(height, TILE), tl.cdiv(width, TILE)
    image = (tile - start) // (rows * columns)
    local = (tile - start) % (rows * columns)
    return level, image, local // columns * TILE, local % columns * TILE, height, width


@jit()
def _reaches(start, end, first, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Whether samples between start and end can touch rows first .. first + TILE - 1."""
    if not ALIGNED:
        end = tl.maximum(end, start + 1)
    return (tl.maximum(start, end) + 1 >= first) & (tl.minimum(start, end) <= first + TILE)


@jit(do_not_specialize=["num_boxes", "num_images", "first_tile"])
def _list_boxes_kernel(
    boxes,  # [K, 5]
    listed,  # [tiles, K] int32: the boxes that reach each tile, in order
    counts,  # [tiles] int32
    sizes,  # L packed (H_l, W_l)
    num_boxes,
    num_images,
    scales,  # L float64 bits
    first_tile,
    ALIGNED: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    tile = first_tile + tl.program_id(0)
    level, image, first_row, first_column, _, _ = _tile(tile, sizes, num_images, TILE)
    scale = scales[0]
    for index in tl.static_range(1, len(sizes)):
        if level == index:
            scale = scales[index]
    scale = float_of(scale, COMPUTE)
    listed += tl.program_id(0).to(tl.int64) * num_boxes
    count = 0
    for start in range(0, num_boxes, STEP):
        k = start + tl.arange(0, STEP)
        box = boxes + tl.minimum(k, num_boxes - 1).to(tl.int64) * 5
        box_image, box_level, pooled = level_of(box, num_images, THRESHOLDS, len(sizes))
        x1, y1, x2, y2 = scaled_box(box, scale, ALIGNED)
        hit = (k < num_boxes) & pooled & finite_box(x1, y1, x2, y2) & (box_image == image) & (box_level == level)
        hit &= _reaches(y1, y2, first_row, TILE, ALIGNED) & _reaches(x1, x2, first_column, TILE, ALIGNED)
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(listed + place, k, mask=hit)
        count += tl.sum(hit.to(tl.int32), 0)
    tl.store(counts + tl.program_id(0), count)


@jit()
def _sample_weights(axis, sample, pixel):
    """Bilinear weights `[pixels, samples]` along an axis, of one sample of each of its bins."""
    position, inside = position_of(axis, sample)
    weight = tl.maximum(1 - tl.abs(position[None, :] - pixel[:, None]), 0.0)
    return tl.where(inside[None, :], weight, 0.0)


@jit()
def _axis_weights(start, end, p, pixel, extent, BINS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """W `[pixels, bins]` along one axis, divided by the bin's number of samples."""
    axis = axis_of(start, end, p.to(start.dtype), extent, BINS, RATIO, ALIGNED)
    weights = tl.zeros((pixel.shape[0], p.shape[0]), start.dtype)
    if RATIO > 0 and RATIO <= 3:
        for i in tl.static_range(RATIO):
            weights += _sample_weights(axis, i, pixel)
    else:
        for i in range(tl.max(tl.where(p < BINS, axis.visited, 0.0), 0).to(tl.int32)):
            weight = _sample_weights(axis, i, pixel)
            weights += tl.where((i < axis.visited)[None, :], weight, 0.0)
    return divide(weights, tl.maximum(axis.grid, 1.0))


@jit()
def _bins_reaching(start, end, first, BINS: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """A range of bins outside of which no sample touches pixels first .. first + TILE - 1."""
    size = end - start if ALIGNED else tl.maximum(end - start, 1.0)
    bin = divide(size, BINS * 1.0)
    safe = tl.where(bin > 0, bin, 1.0)
    low = tl.minimum(tl.maximum(tl.floor(divide(first - 1 - start, safe)) - 1, 0.0), BINS)
    high = tl.minimum(tl.maximum(tl.ceil(divide(first + TILE - start, safe)) + 1, 0.0), BINS)
    return tl.where(bin > 0, low, 0.0).to(tl.int32), tl.where(bin > 0, high, BINS).to(tl.int32)


@jit()
def _load_bins(grad, p, q, channel, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, CHANNELS: tl.constexpr):
    """Gradients `[bins, channels]` of bins (p, q) of a box, 0 where there is no such bin or channel."""
    inside = ((p < PH) & (q < PW))[:, None]
    if C % CHANNELS != 0:
        inside &= (channel < C)[None, :]
    return tl.load(grad + ((p * PW + q) * C)[:, None] + channel[None, :], mask=inside, other=0.0)


@jit()
def _outer_product(weight_y, weight_x):
    """Weights `[pixels, bins]` of the pixels of a tile, from those along the axes."""
    weight = weight_y[:, None, :, None] * weight_x[None, :, None, :]
    return tl.reshape(weight, (weight_y.shape[0] * weight_x.shape[0], weight_y.shape[1] * weight_x.shape[1]))


@jit()
def _add_product(total, weight, grad_bins, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """`total` and the product of weights `[pixels, bins]` and gradients `[bins, channels]`."""
    return tl.dot(weight.to(PRODUCT), grad_bins.to(PRODUCT), total, input_precision=PRECISION, out_dtype=total.dtype)


@jit()
def _add_winner(total, grad_bin, winner, rows, columns, row, column):
    """`total` and the gradient of one bin, which goes to the sample that won it, of each channel."""
    across = tl.maximum(columns.visited.to(tl.int32), 1)
    weight = _sample_weights(rows, winner // across, row)
    weight *= _sample_weights(columns, winner % across, column)
    return total + weight * grad_bin[None, :]


@jit(do_not_specialize=["num_boxes", "num_images", "first_tile"])
def _roi_align_backward_kernel(
    grad,  # [K, PH, PW, C]
    boxes,  # [K, 5] of COMPUTE
    argmax,  # [K, PH, PW, C] int32; read for the maximum only
    listed,  # [tiles, K] int32
    counts,  # [tiles] int32
    outputs,  # L of [N, H_l, W_l, C] or [N, C, H_l, W_l]
    sizes,  # L packed (H_l, W_l)
    num_boxes,
    num_images,
    scales,  # L float64 bits
    first_tile,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    REDUCTION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # the outputs
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,  # bin rows of one product
    COLUMNS: tl.constexpr,  # and bin columns: PW, rounded up to a power of two, or less
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,  # dtype of the product's factors
    PRECISION: tl.constexpr,
):
    tile = first_tile + tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    level, image, first_row, first_column, height, width = _tile(tile, sizes, num_images, TILE)
    output, scale = outputs[0], scales[0]
    for index in tl.static_range(1, len(sizes)):
        if level == index:
            output, scale = outputs[index], scales[index]
    scale = float_of(scale, COMPUTE)

    total = tl.zeros((TILE * TILE, CHANNELS), COMPUTE)
    pixel = tl.arange(0, TILE * TILE)
    row, column = first_row + pixel // TILE, first_column + pixel % TILE
    listed += tl.program_id(0).to(tl.int64) * num_boxes
    for entry in range(tl.load(counts + tl.program_id(0))):
        k = tl.load(listed + entry).to(tl.int64)
        x1, y1, x2, y2 = scaled_box(boxes + k * 5, scale, ALIGNED)
        if REDUCTION == "max":
            for bin in range(PH * PW):
                rows = axis_of(y1, y2, bin // PW * 1.0, height, PH, RATIO, ALIGNED)
                columns = axis_of(x1, x2, bin % PW * 1.0, width, PW, RATIO, ALIGNED)
                reaches = _reaches(rows.start, rows.start + rows.bin, first_row, TILE, True)
                if reaches & _reaches(columns.start, columns.start + columns.bin, first_column, TILE, True):
                    place = (k * (PH * PW) + bin) * C + channel
                    grad_bin = tl.load(grad + place, mask=channel < C, other=0.0).to(COMPUTE)
                    winner = tl.load(argmax + place, mask=channel < C, other=0)
                    total = _add_winner(total, grad_bin, winner, rows, columns, row, column)
        else:
            tile_column = first_column + tl.arange(0, TILE)
            if PH <= ROWS and PW <= COLUMNS:
                weight_x = _axis_weights(x1, x2, tl.arange(0, COLUMNS), tile_column, width, PW, RATIO, ALIGNED)
                tile_row = first_row + tl.arange(0, TILE)
                weight_y = _axis_weights(y1, y2, tl.arange(0, ROWS), tile_row, height, PH, RATIO, ALIGNED)
                weight = _outer_product(weight_y, weight_x)
                p, q = tl.arange(0, ROWS * COLUMNS) // COLUMNS, tl.arange(0, ROWS * COLUMNS) % COLUMNS
                grad_bins = _load_bins(grad + k * (PH * PW * C), p, q, channel, C, PH, PW, CHANNELS)
                total = _add_product(total, weight, grad_bins, PRODUCT, PRECISION)
            else:
                first_bin, last_bin = _bins_reaching(y1, y2, first_row, PH, ALIGNED, TILE)
                for first_q in range(0, PW, COLUMNS):
                    bin_columns = first_q + tl.arange(0, COLUMNS)
                    weight_x = _axis_weights(x1, x2, bin_columns, tile_column, width, PW, RATIO, ALIGNED)
                    for first_p in range(first_bin, last_bin, ROWS):
                        tile_row = first_row + tl.arange(0, TILE)
                        bin_rows = first_p + tl.arange(0, ROWS)
                        weight_y = _axis_weights(y1, y2, bin_rows, tile_row, height, PH, RATIO, ALIGNED)
                        weight = _outer_product(weight_y, weight_x)
                        p = first_p + tl.arange(0, ROWS * COLUMNS) // COLUMNS
                        q = first_q + tl.arange(0, ROWS * COLUMNS) % COLUMNS
                        grad_bins = _load_bins(grad + k * (PH * PW * C), p, q, channel, C, PH, PW, CHANNELS)
                        total = _add_product(total, weight, grad_bins, PRODUCT, PRECISION)

    if CHANNELS_LAST:
        place = (image.to(tl.int64) * height * width + row.to(tl.int64) * width + column)[:, None] * C
        place += channel[None, :]
    else:
        place = (image.to(tl.int64) * C + channel)[None, :] * height * width
        place += (row.to(tl.int64) * width + column)[:, None]
    inside = (row < height) & (column < width)
    if C % CHANNELS == 0:
        tl.store(output + place, total.to(output.dtype.element_ty), mask=inside[:, None])
    else:
        mask = inside[:, None] & (channel < C)[None, :]
        tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)


# Triton 3.6 interprets a bfloat16 product wrongly.
_PRODUCT_DTYPE = triton and {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,
}


def launch_roi_align_backward(
    grad: Tensor, boxes: Tensor, argmax: Tensor, shape: PyramidShape, channels_last: bool, spec: RoIAlignSpec
) -> list[Tensor]:
    """Gradients of the levels."""
    grads = shape.empty_features(grad, channels_last)
    channels = grad.shape[1]
    tiles = sum(ceil_div(height, TILE) * ceil_div(width, TILE) for height, width in shape.levels) * shape.num_images
    if not tiles or not channels:
        return grads
    block = CHANNELS_PER_PROGRAM[grad.element_size()]
    columns = min(next_power_of_2(spec.pooled_width), BINS_PER_PRODUCT)
    rows = BINS_PER_PRODUCT // columns
    several_products = spec.pooled_height > rows or spec.pooled_width > columns
    boxes = boxes.contiguous()
    grad = grad.contiguous(memory_format=torch.channels_last)
    argmax = argmax.contiguous(memory_format=torch.channels_last)
    step = min(tiles, max(1, MAX_LIST_ENTRIES // max(len(boxes), 1)))
    listed = torch.empty(step, len(boxes), dtype=torch.int32, device=boxes.device)
    counts = torch.empty(step, dtype=torch.int32, device=boxes.device)
    pyramid = {
        "sizes": shape.kernel_sizes(),
        "num_boxes": len(boxes),
        "num_images": shape.num_images,
        "scales": spec.scale_bits(),
        "ALIGNED": spec.aligned,
        "COMPUTE": triton_dtype(grad.dtype),
        "TILE": TILE,
        "enable_fp_fusion": False,
    }
    for first_tile in range(0, tiles, step):
        in_launch = min(step, tiles - first_tile)
        with on_device_of(boxes):
            _list_boxes_kernel[(in_launch,)](
                boxes,
                listed,
                counts,
                first_tile=first_tile,
                THRESHOLDS=spec.thresholds(boxes.dtype),
                STEP=BOXES_PER_STEP,
                **pyramid,
            )
            _roi_align_backward_kernel[(in_launch, ceil_div(channels, block))](
                grad,
                boxes,
                argmax,
                listed,
                counts,
                tuple(grads),
                first_tile=first_tile,
                C=channels,
                PH=spec.pooled_height,
                PW=spec.pooled_width,
                RATIO=max(spec.sampling_ratio, 0),
                REDUCTION=spec.reduction,
                CHANNELS_LAST=channels_last,
                ROWS=rows,
                COLUMNS=columns,
                CHANNELS=block,
                PRODUCT=_PRODUCT_DTYPE[grad.dtype],
                PRECISION="tf32x3" if grad.dtype == torch.float32 and target_backend() == "cuda" else "ieee",
                num_warps=NUM_WARPS_ADAPTIVE if several_products and spec.sampling_ratio <= 0 else NUM_WARPS,
                num_stages=NUM_STAGES,
                **pyramid,
            )
    return grads
