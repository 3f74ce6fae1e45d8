"""Gradient of RoIAlign with respect to the features, without atomics: every pixel gathers what it is owed.

    grad_features[l][n, c, y, x] = sum over boxes k of level l and image n, and over bins (p, q)
                                   of Wy[k, y, p] * Wx[k, x, q] * grad[k, c, p, q]

The mean over a bin's samples is separable: Wy[k, y, p] is the total weight, over the samples of row p, of feature
row y, divided by their number. A program owns a tile of TILE x TILE pixels and a block of channels of one image and
level; one small kernel has listed the boxes that reach the tile, in order. Per box the program forms the
[pixels x bins] matrix of weights and adds its product with the [bins x channels] gradient.

Each gradient element is written once, in the features' precision, zeros included: no float32 copy of the
pyramid to zero, to add to and to cast (112 us of memory time on an H200 for the 45.7 MB pyramid of an 800 x 1344
image, against 27 us). Sums are float32 in the order of the boxes: same inputs, same bits. float16 and bfloat16
weights are rounded to that precision for the tensor cores; the products are exact and summed in float32.

The gradient of the maximum goes to the sample that won; there the weights depend on the channel, and the
product becomes a loop over the bins that reach the tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._runtime import (
    INTERPRETED,
    divide,
    empty,
    float64_bits,
    float_of,
    jit,
    on_device_of,
    pack_size,
    register,
    target_backend,
    tl,
    triton,
)
from fastmask.kernels.roi_align.geometry import (
    Settings,
    finite_box,
    level_of,
    position_of,
    sample_axis,
    scaled_box,
    size_of,
)
from fastmask.kernels.roi_align.reference import roi_align_backward_reference

# Chosen by compiling, see docs/compile_report.md: 64 pixels x 64 channels of float32 sums in 4 warps leave room
# for the weights without spills. Not yet measured on a GPU.
TILE = 8
CHANNELS_PER_PROGRAM = {2: 64, 4: 32, 8: 32}  # by the bytes of an element
BINS_PER_PRODUCT = 64
BOXES_PER_STEP = 128
# Boxes listed at a time, of all tiles together: beyond, tiles go by in several pairs of launches.
LISTED = 1 << 25
NUM_WARPS = 4
NUM_WARPS_ADAPTIVE = 8  # of several products per box: with 4, sm_100 spills
NUM_STAGES = 3


@jit()
def _tile(tile, sizes, num_images, TILE: tl.constexpr):
    """Level, image, first row, first column, height and width of the tile numbered `tile`."""
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


@jit(do_not_specialize=["first_tile", "num_boxes", "num_images"])
def _list_boxes_kernel(
    boxes,  # [K, 5]
    listed,  # [tiles, K] int32: the boxes that reach each tile, in order
    counts,  # [tiles] int32
    sizes,  # L packed (H_l, W_l)
    scales,  # L float64 bits
    first_tile,
    num_boxes,
    num_images,
    ALIGNED: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    tile = first_tile + tl.program_id(0)
    level, image, first_row, first_column, _, _ = _tile(tile, sizes, num_images, TILE)
    scale = scales[0]
    for index in tl.static_range(1, len(sizes)):
        if level == index:
            scale = scales[index]
    scale = float_of(scale, boxes.dtype.element_ty)
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
def _sample_weights(base, bin, grid, sample, pixel, extent):
    """Bilinear weights `[pixels, samples]` along one axis of samples, each of its own bin."""
    position, inside = position_of(base, bin, grid, sample, extent)
    weight = tl.maximum(1 - tl.abs(position[None, :] - pixel[:, None]), 0.0)
    return tl.where(inside[None, :], weight, 0.0)


@jit()
def _axis_weights(start, end, p, pixel, extent, BINS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """W `[pixels, bins]` along one axis, divided by the bin's number of samples."""
    base, bin, grid, skipped, visited = sample_axis(start, end, p.to(start.dtype), extent, BINS, RATIO, ALIGNED)
    weights = tl.zeros((pixel.shape[0], p.shape[0]), start.dtype)
    if RATIO > 0 and RATIO <= 3:
        for i in tl.static_range(RATIO):
            weights += _sample_weights(base, bin, grid, skipped + i, pixel, extent)
    else:
        for i in range(tl.max(tl.where(p < BINS, visited, 0.0), 0).to(tl.int32)):
            weight = _sample_weights(base, bin, grid, skipped + i, pixel, extent)
            weights += tl.where((i < visited)[None, :], weight, 0.0)
    return divide(weights, tl.maximum(grid, 1.0))


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
def _add_bins(
    total,
    grad,  # [K, PH, PW, C]
    k,
    first_p,
    first_q,
    weight_x,  # [TILE, COLUMNS]
    y1,
    y2,
    first_row,
    height,
    channel,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`total` and the product of weights and gradient of ROWS x COLUMNS bins of box k."""
    rows = first_row + tl.arange(0, TILE)
    weight_y = _axis_weights(y1, y2, first_p + tl.arange(0, ROWS), rows, height, PH, RATIO, ALIGNED)
    weight = weight_y[:, None, :, None] * weight_x[None, :, None, :]
    weight = tl.reshape(weight, (TILE * TILE, ROWS * COLUMNS))
    p = first_p + tl.arange(0, ROWS * COLUMNS) // COLUMNS
    q = first_q + tl.arange(0, ROWS * COLUMNS) % COLUMNS
    inside = ((p < PH) & (q < PW))[:, None]
    if C % CHANNELS != 0:
        inside &= (channel < C)[None, :]
    grad += k * (PH * PW * C)
    owed = tl.load(grad + ((p * PW + q) * C)[:, None] + channel[None, :], mask=inside, other=0.0)
    return tl.dot(weight.to(PRODUCT), owed.to(PRODUCT), total, input_precision=PRECISION, out_dtype=total.dtype)


@jit(do_not_specialize=["first_tile", "num_boxes", "num_images"])
def _roi_align_backward_kernel(
    grad,  # [K, PH, PW, C]
    boxes,  # [K, 5]
    argmax,  # [K, PH, PW, C] int32; not read unless MAXIMUM
    listed,  # [tiles, K] int32
    counts,  # [tiles] int32
    outputs,  # L of [N, H_l, W_l, C] or [N, C, H_l, W_l]
    sizes,  # L packed (H_l, W_l)
    scales,  # L float64 bits
    first_tile,
    num_boxes,
    num_images,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    MAXIMUM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,  # bin rows of one product
    COLUMNS: tl.constexpr,  # and bin columns: PW, rounded up to a power of two, or less
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,  # dtype of the product's factors
    PRECISION: tl.constexpr,
):
    tile = first_tile + tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dtype = boxes.dtype.element_ty
    level, image, first_row, first_column, height, width = _tile(tile, sizes, num_images, TILE)
    output, scale = outputs[0], scales[0]
    for index in tl.static_range(1, len(sizes)):
        if level == index:
            output, scale = outputs[index], scales[index]
    scale = float_of(scale, dtype)

    total = tl.zeros((TILE * TILE, CHANNELS), dtype)
    pixel = tl.arange(0, TILE * TILE)
    row, column = first_row + pixel // TILE, first_column + pixel % TILE
    listed += tl.program_id(0).to(tl.int64) * num_boxes
    for entry in range(tl.load(counts + tl.program_id(0))):
        k = tl.load(listed + entry).to(tl.int64)
        x1, y1, x2, y2 = scaled_box(boxes + k * 5, scale, ALIGNED)
        if MAXIMUM:
            for bin in range(PH * PW):
                p, q = bin // PW * 1.0, bin % PW * 1.0
                base_y, bin_y, grid_y, skip_y, _ = sample_axis(y1, y2, p, height, PH, RATIO, ALIGNED)
                base_x, bin_x, grid_x, skip_x, visit_x = sample_axis(x1, x2, q, width, PW, RATIO, ALIGNED)
                reaches = _reaches(base_y, base_y + bin_y, first_row, TILE, True)
                if reaches & _reaches(base_x, base_x + bin_x, first_column, TILE, True):
                    place = (k * (PH * PW) + bin) * C + channel
                    owed = tl.load(grad + place, mask=channel < C, other=0.0).to(dtype)
                    won = tl.load(argmax + place, mask=channel < C, other=0)
                    across = tl.maximum(visit_x.to(tl.int32), 1)
                    weight = _sample_weights(base_y, bin_y, grid_y, skip_y + won // across, row, height)
                    weight *= _sample_weights(base_x, bin_x, grid_x, skip_x + won % across, column, width)
                    total += weight * owed[None, :]
        else:
            columns = first_column + tl.arange(0, TILE)
            if PH <= ROWS and PW <= COLUMNS:
                weight_x = _axis_weights(x1, x2, tl.arange(0, COLUMNS), columns, width, PW, RATIO, ALIGNED)
                total = _add_bins(
                    total, grad, k, 0, 0, weight_x, y1, y2, first_row, height, channel,
                    C, PH, PW, RATIO, ALIGNED, TILE, ROWS, COLUMNS, CHANNELS, PRODUCT, PRECISION,
                )  # fmt: skip
            else:
                first_bin, last_bin = _bins_reaching(y1, y2, first_row, PH, ALIGNED, TILE)
                for q in range(0, PW, COLUMNS):
                    bins = q + tl.arange(0, COLUMNS)
                    weight_x = _axis_weights(x1, x2, bins, columns, width, PW, RATIO, ALIGNED)
                    for p in range(first_bin, last_bin, ROWS):
                        total = _add_bins(
                            total, grad, k, p, q, weight_x, y1, y2, first_row, height, channel,
                            C, PH, PW, RATIO, ALIGNED, TILE, ROWS, COLUMNS, CHANNELS, PRODUCT, PRECISION,
                        )  # fmt: skip

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


def _launch_roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    argmax: Tensor,
    sizes: list[int],
    channels_last: bool,
    maximum: bool,
    *arguments: Any,
) -> list[Tensor]:
    grads = _fake_roi_align_backward(grad, boxes, argmax, sizes, channels_last)
    images, channels = grads[0].shape[:2]
    tiles = sum(triton.cdiv(level.shape[2], TILE) * triton.cdiv(level.shape[3], TILE) for level in grads) * images
    if not tiles or not channels:
        return grads
    settings = Settings(*arguments)
    shapes = (
        tuple(pack_size(*level.shape[2:]) for level in grads),
        tuple(float64_bits(scale) for scale in settings.spatial_scales),
    )
    block = CHANNELS_PER_PROGRAM[grad.element_size()]
    columns = min(triton.next_power_of_2(grad.shape[3]), BINS_PER_PRODUCT)
    rows = BINS_PER_PRODUCT // columns
    several_products = grad.shape[2] > rows or grad.shape[3] > columns
    boxes = boxes.contiguous()
    grad = grad.contiguous(memory_format=torch.channels_last)
    argmax = argmax.contiguous(memory_format=torch.channels_last)
    step = min(tiles, max(1, LISTED // max(len(boxes), 1)))
    listed = torch.empty(step, len(boxes), dtype=torch.int32, device=boxes.device)
    counts = torch.empty(step, dtype=torch.int32, device=boxes.device)
    for first_tile in range(0, tiles, step):
        these = min(step, tiles - first_tile)
        geometry = (*shapes, first_tile, len(boxes), images)
        with on_device_of(boxes):
            _list_boxes_kernel[(these,)](
                boxes,
                listed,
                counts,
                *geometry,
                ALIGNED=settings.aligned,
                THRESHOLDS=settings.thresholds(boxes.dtype),
                TILE=TILE,
                STEP=BOXES_PER_STEP,
                enable_fp_fusion=False,
            )
            _roi_align_backward_kernel[(these, triton.cdiv(channels, block))](
                grad,
                boxes,
                argmax,
                listed,
                counts,
                tuple(grads),
                *geometry,
                C=channels,
                PH=grad.shape[2],
                PW=grad.shape[3],
                RATIO=max(settings.sampling_ratio, 0),
                ALIGNED=settings.aligned,
                MAXIMUM=maximum,
                CHANNELS_LAST=channels_last,
                TILE=TILE,
                ROWS=rows,
                COLUMNS=columns,
                CHANNELS=block,
                PRODUCT=_PRODUCT_DTYPE[grad.dtype],
                PRECISION="tf32x3" if grad.dtype == torch.float32 and target_backend() == "cuda" else "ieee",
                num_warps=NUM_WARPS_ADAPTIVE if several_products and settings.sampling_ratio <= 0 else NUM_WARPS,
                num_stages=NUM_STAGES,
                enable_fp_fusion=False,
            )
    return grads


# Triton 3.6 interprets a bfloat16 product wrongly.
_PRODUCT_DTYPE = triton and {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,
}


def _fake_roi_align_backward(
    grad: Tensor, boxes: Tensor, argmax: Tensor, sizes: list[int], channels_last: bool, *_: object
) -> list[Tensor]:
    del boxes, argmax
    images, *sides = sizes
    return [
        empty(grad, (images, grad.shape[1], height, width), channels_last)
        for height, width in zip(sides[::2], sides[1::2], strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    del output
    grad, boxes, _, _, _, ctx.maximum, *ctx.rule = inputs
    ctx.pooled = grad.shape[2:]
    ctx.save_for_backward(boxes)


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The mean is linear in the features: the gradient of its gradient is RoIAlign itself."""
    if ctx.maximum:
        raise NotImplementedError('roi_align: reduction="max" has no second derivative, use reduction="mean"')
    (boxes,) = ctx.saved_tensors
    output, _ = torch.ops.fastmask.roi_align(grads, boxes, *ctx.pooled, False, *ctx.rule)
    return output, *[None] * 11


roi_align_backward = register(
    "roi_align_backward(Tensor grad, Tensor boxes, Tensor argmax, SymInt[] sizes, bool channels_last, bool maximum,"
    " float[] spatial_scales, int sampling_ratio, bool aligned, float canonical_box_size, int canonical_level,"
    " str level_rounding) -> Tensor[]",
    reference=roi_align_backward_reference,
    launch=_launch_roi_align_backward,
    fake=_fake_roi_align_backward,
    backward=_double_backward,
    setup_context=_setup_context,
)
