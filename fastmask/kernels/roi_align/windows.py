"""The sum of a tile of pixels over windows of bins: the inner loop of RoIAlign's gradient.

Four warps and 256 channels of bfloat16 compile to one matrix product of 64 pixels, 256 channels and 16 bins per window
on sm_90, with weights computed once for all channels: 262 instructions per window and warp, with the loads of the next
window. The training batch of `benchmarks/bench_roi_align.py` has 12,300 windows of 4 x 4 bins, and would have 10,800 of
4 x 8 or 9,700 of 8 x 8; a larger window reads and multiplies more bins that do not reach the tile. Not yet measured on
a GPU.
"""

from __future__ import annotations

from fastmask.kernels._runtime import divide_by_constant, jit, tl
from fastmask.kernels.roi_align.geometry import axis_of, divide_by_grid, position_of, scaled_box
from fastmask.kernels.roi_align.tile_lists import bins_reaching


@jit()
def _sample_weights(axis, sample, first, offset, RATIO: tl.constexpr):
    """Bilinear weights `[pixels, samples]` along an axis, of one sample of each of its bins, at pixels first + offset.

    Differences of integers and positions near the tile are exact. A sample that is not inside is moved away from it.
    """
    position, inside = position_of(axis, sample, RATIO)
    position = tl.where(inside, position - first, -4.0)
    return tl.maximum(1 - tl.abs(position[None, :] - offset[:, None]), 0.0)


@jit()
def _axis_weights(axis, exists, first, offset, RATIO: tl.constexpr):
    """W `[pixels, bins]` along one axis, not divided by the bin's number of samples."""
    weights = _sample_weights(axis, 0, first, offset, RATIO)
    if RATIO > 0 and RATIO <= 3:
        for i in tl.static_range(1, RATIO):
            weights += _sample_weights(axis, i, first, offset, RATIO)
    else:
        weights = tl.where((axis.visited > 0)[None, :], weights, 0.0)
        for i in range(1, tl.max(tl.where(exists, axis.visited, 0.0), 0).to(tl.int32)):
            weights += tl.where((i < axis.visited)[None, :], _sample_weights(axis, i, first, offset, RATIO), 0.0)
    return weights


@jit()
def _outer_product(weight_y, weight_x):
    """Weights `[pixels, bins]` of the pixels of a tile, from those along the axes."""
    weight = weight_y[:, None, :, None] * weight_x[None, :, None, :]
    return tl.reshape(weight, (weight_y.shape[0] * weight_x.shape[0], weight_y.shape[1] * weight_x.shape[1]))


@jit()
def _add_winner(total, grad_bin, winner, rows, columns, tile, pixel, TILE: tl.constexpr, RATIO: tl.constexpr):
    """`total` and the gradient of one bin, which goes to the sample that won it, of each channel."""
    across = tl.maximum(columns.visited.to(tl.int32), 1)
    weight = _sample_weights(rows, winner // across, tile.row, pixel // TILE, RATIO)
    weight *= _sample_weights(columns, winner % across, tile.column, pixel % TILE, RATIO)
    if RATIO == 0:  # an empty box has no samples, and its winner 0 is none
        weight = tl.where((rows.visited > 0) & (columns.visited > 0), weight, 0.0)
    return total + weight * grad_bin[None, :]


@jit()
def sum_windows(
    grad,
    boxes,
    argmax,
    windows,
    count,
    tile,
    scale,
    channel,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    REDUCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient `[pixels, channels]` of a tile from the first `count` of `windows`."""
    total = tl.zeros((TILE * TILE, CHANNELS), COMPUTE)
    for at in range(count):
        window = tl.load(windows + at)
        k, bin_row = window // (PH * PW), window // PW
        p, q = bin_row - k * PH, window - bin_row * PW
        x1, y1, x2, y2 = scaled_box(boxes + k.to(tl.int64) * 5, scale, ALIGNED)
        if REDUCTION == "max":
            pixel = tl.arange(0, TILE * TILE)
            _, end_p = bins_reaching(y1, y2, tile.row, PH, RATIO, ALIGNED, TILE)
            _, end_q = bins_reaching(x1, x2, tile.column, PW, RATIO, ALIGNED, TILE)
            for bin_p in range(p, tl.minimum(p + WINDOW, end_p)):
                rows = axis_of(y1, y2, bin_p * 1.0, tile.height, PH, RATIO, ALIGNED)
                for bin_q in range(q, tl.minimum(q + WINDOW, end_q)):
                    columns = axis_of(x1, x2, bin_q * 1.0, tile.width, PW, RATIO, ALIGNED)
                    place = ((k.to(tl.int64) * PH + bin_p) * PW + bin_q) * C + channel
                    grad_bin = tl.load(grad + place, mask=channel < C, other=0.0).to(COMPUTE)
                    winner = tl.load(argmax + place, mask=channel < C, other=0)
                    total = _add_winner(total, grad_bin, winner, rows, columns, tile, pixel, TILE, RATIO)
        else:
            bin = tl.arange(0, WINDOW * WINDOW)
            inside = ((p + bin // WINDOW < PH) & (q + bin % WINDOW < PW))[:, None]
            if C % CHANNELS != 0:
                inside &= (channel < C)[None, :]
            place = ((bin // WINDOW * PW + bin % WINDOW) * C)[:, None] + channel[None, :]
            grad_bins = tl.load(grad + window.to(tl.int64) * C + place, mask=inside, other=0.0)
            bin_rows, bin_columns = p + tl.arange(0, WINDOW), q + tl.arange(0, WINDOW)
            rows = axis_of(y1, y2, bin_rows.to(COMPUTE), tile.height, PH, RATIO, ALIGNED)
            columns = axis_of(x1, x2, bin_columns.to(COMPUTE), tile.width, PW, RATIO, ALIGNED)
            weight_y = _axis_weights(rows, bin_rows < PH, tile.row, tl.arange(0, TILE), RATIO)
            weight_x = _axis_weights(columns, bin_columns < PW, tile.column, tl.arange(0, TILE), RATIO)
            if RATIO > 0:
                weight_x = divide_by_constant(weight_x, RATIO * RATIO)
            else:
                weight_y = divide_by_grid(weight_y, rows)
                weight_x = divide_by_grid(weight_x, columns)
            weight = _outer_product(weight_y, weight_x)
            total = tl.dot(
                weight.to(PRODUCT), grad_bins.to(PRODUCT), total, input_precision=PRECISION, out_dtype=COMPUTE
            )
    return total
