"""The kernel of `decode_keypoints`, and its launcher."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    compute_dtype,
    current_device,
    divide,
    jit,
    next_power_of_2,
    on_device_of,
    target_backend,
    tl,
    triton_dtype,
)
from fastmask.kernels.decode_keypoints.geometry import EXCESS, MAX_SIDE, SLACK

# By the static model (H200, 100 persons): 75 us; the largest box alone takes 73. One warp with 64 pixels a step issues
# less, 28 us, but takes 302 for the largest box. Compiled: 66 to 80 registers; without the limit ptxas aims at 64 and
# spills some. Not yet measured on a GPU.
PIXELS_PER_STEP = 128
SCAN = 512
NUM_WARPS = 4
MAX_REGISTERS = 80


@jit()
def _side(start, end, MAX_SIDE: tl.constexpr):
    """A side of a box, at least 1, and the whole pixels that a heatmap is resized to."""
    side = tl.where(end - start >= 1, end - start, 1.0)  # NaN gives 1
    return side, tl.minimum(tl.ceil(side), MAX_SIDE).to(tl.int32)


@jit()
def _bound(inner, outer, EXCESS: tl.constexpr):
    """An upper bound, from the larger inner and the smaller outer value; of negated values, minus a lower bound."""
    return tl.maximum(inner, inner + (inner - outer) * EXCESS)


@jit()
def _row_bounds(heatmap, row, cell, H: tl.constexpr, W: tl.constexpr, COMPUTE: tl.constexpr, EXCESS: tl.constexpr):
    """Bounds of the interpolation along a row of heatmap pixels, in each cell: an upper one, and minus a lower one."""
    heatmap += tl.minimum(tl.maximum(row, 0), H - 1) * W
    a = tl.load(heatmap + tl.minimum(tl.maximum(cell - 2, 0), W - 1)).to(COMPUTE)
    b = tl.load(heatmap + tl.minimum(tl.maximum(cell - 1, 0), W - 1)).to(COMPUTE)
    c = tl.load(heatmap + tl.minimum(cell, W - 1)).to(COMPUTE)
    d = tl.load(heatmap + tl.minimum(cell + 1, W - 1)).to(COMPUTE)
    upper = _bound(tl.maximum(b, c), tl.minimum(a, d), EXCESS)
    return upper, _bound(-tl.minimum(b, c), -tl.maximum(a, d), EXCESS)


@jit()
def _inner_weight(x):
    return (1.25 * x - 2.25) * x * x + 1


@jit()
def _outer_weight(x):
    return ((-0.75 * x + 3.75) * x - 6) * x + 3


@jit()
def _position(pixel, scale):
    """Where a resized pixel lies in the heatmap: the pixel before it, and the distance from there."""
    position = (pixel.to(scale.dtype) + 0.5) * scale - 0.5
    low = tl.floor(position)
    return low.to(tl.int32), position - low


@jit()
def _interpolate_row(heatmap, row, low, w0, w1, w2, w3, H: tl.constexpr, W: tl.constexpr):
    """The value at x in one row of neighbours."""
    line = heatmap + tl.minimum(tl.maximum(row, 0), H - 1) * W
    a = tl.load(line + tl.minimum(tl.maximum(low - 1, 0), W - 1)).to(w0.dtype)
    b = tl.load(line + tl.minimum(tl.maximum(low, 0), W - 1)).to(w0.dtype)
    c = tl.load(line + tl.minimum(tl.maximum(low + 1, 0), W - 1)).to(w0.dtype)
    d = tl.load(line + tl.minimum(tl.maximum(low + 2, 0), W - 1)).to(w0.dtype)
    return a * w0 + b * w1 + c * w2 + d * w3


@jit()
def _resized(heatmap, y, x, y_scale, x_scale, H: tl.constexpr, W: tl.constexpr):
    """Values of the resized heatmap."""
    row, ty = _position(y, y_scale)
    low, tx = _position(x, x_scale)
    w0, w1, w2, w3 = _outer_weight(1 + tx), _inner_weight(tx), _inner_weight(1 - tx), _outer_weight(2 - tx)
    value = _interpolate_row(heatmap, row - 1, low, w0, w1, w2, w3, H, W) * _outer_weight(1 + ty)
    value += _interpolate_row(heatmap, row, low, w0, w1, w2, w3, H, W) * _inner_weight(ty)
    value += _interpolate_row(heatmap, row + 1, low, w0, w1, w2, w3, H, W) * _inner_weight(1 - ty)
    return value + _interpolate_row(heatmap, row + 2, low, w0, w1, w2, w3, H, W) * _outer_weight(2 - ty)


@jit()
def _pixels_of_cell(cell, pixels, M: tl.constexpr, COMPUTE: tl.constexpr):
    """The first resized pixel of a cell along one axis, and the end; one more on a side where rounding may decide."""
    per_cell = pixels.to(COMPUTE) * (1.0 / M)
    first = tl.ceil((cell - 0.5) * per_cell - (0.5 + 0.015625)).to(tl.int32)
    end = tl.ceil((cell + 0.5) * per_cell - (0.5 - 0.015625)).to(tl.int32)
    return tl.maximum(first, 0), tl.minimum(end, pixels)


@jit()
def _decode_keypoints_kernel(
    heatmaps,  # [N, P, H, W]
    boxes,  # [N, 4]
    keypoints,  # [N, P, 3]
    scores,  # [N, P]
    P: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,  # W + 1 cells of a row, rounded up to a power of two
    SCAN: tl.constexpr,  # heatmap pixels of a step
    STEP: tl.constexpr,  # resized pixels of a step
    PROBABILITY: tl.constexpr,
    COMPUTE: tl.constexpr,
    MAX_SIDE: tl.constexpr,
    EXCESS: tl.constexpr,
    SLACK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    box = boxes + program // P * 4
    x1, y1 = tl.load(box).to(COMPUTE), tl.load(box + 1).to(COMPUTE)
    width, columns = _side(x1, tl.load(box + 2).to(COMPUTE), MAX_SIDE)
    height, rows = _side(y1, tl.load(box + 3).to(COMPUTE), MAX_SIDE)
    x_scale = divide(tl.full((), W, COMPUTE), columns.to(COMPUTE))
    y_scale = divide(tl.full((), H, COMPUTE), rows.to(COMPUTE))
    heatmap = heatmaps + program * (H * W)
    lane = tl.arange(0, COLUMNS)

    # The largest pixel and magnitude. `excluded` stays 0 unless a pixel is not finite.
    largest, at = tl.full((SCAN,), -float("inf"), COMPUTE), tl.zeros((SCAN,), tl.int32)
    magnitude, excluded = tl.zeros((SCAN,), COMPUTE), tl.zeros((SCAN,), COMPUTE)
    for first in range(0, H * W, SCAN):
        place = first + tl.arange(0, SCAN)
        logit = tl.load(heatmap + place, mask=place < H * W, other=0.0).to(COMPUTE)
        excluded += logit * 0.0
        magnitude = tl.maximum(magnitude, tl.abs(logit))
        logit = tl.where(place < H * W, logit, -float("inf"))
        at = tl.where(logit > largest, place, at)
        largest = tl.maximum(largest, logit)
    finite = tl.sum(excluded, 0) == 0
    slack = tl.max(magnitude, 0) * SLACK
    peak = tl.min(tl.where(largest == tl.max(largest, 0), at, H * W - 1), 0)

    # The resized pixel next to it; every lane starts with this one.
    start_y = tl.minimum((2 * (peak // W) + 1) * rows // (2 * H), rows - 1)
    start_x = tl.minimum((2 * (peak % W) + 1) * columns // (2 * W), columns - 1)
    start = _resized(heatmap, start_y, start_x, y_scale, x_scale, H, W)
    best = tl.zeros((STEP,), COMPUTE) + start
    index = tl.zeros((STEP,), tl.int32) + (start_y * columns + start_x)
    threshold = start - slack

    # Cell c of a row lies between heatmap pixels c - 1 and c. Rows of neighbours are bounded once, and kept for four
    # rows of cells.
    # Three calls, although the rows are clamped to one: Triton takes a loop variable that is assigned the initial value
    # of another one for unchanged, and would not carry it.
    _, lower0 = _row_bounds(heatmap, -2, lane, H, W, COMPUTE, EXCESS)
    upper1, lower1 = _row_bounds(heatmap, -1, lane, H, W, COMPUTE, EXCESS)
    upper2, lower2 = _row_bounds(heatmap, 0, lane, H, W, COMPUTE, EXCESS)
    for cell_y in range(tl.where(finite, H + 1, 0)):
        upper3, lower3 = _row_bounds(heatmap, cell_y + 1, lane, H, W, COMPUTE, EXCESS)
        bound = _bound(tl.maximum(upper1, upper2), -tl.maximum(lower0, lower3), EXCESS)
        cell_x = tl.min(tl.where((bound >= threshold) & (lane <= W), lane, COLUMNS), 0)
        if cell_x < COLUMNS:
            y_first, y_end = _pixels_of_cell(cell_y, rows, H, COMPUTE)
            while cell_x < COLUMNS:
                x_first, x_end = _pixels_of_cell(cell_x, columns, W, COMPUTE)
                across = tl.maximum(x_end - x_first, 1)
                count = tl.where(x_first < x_end, (y_end - y_first) * across, 0)
                for pixel in range(0, count, STEP):
                    number = tl.minimum(pixel + tl.arange(0, STEP), count - 1)
                    y = y_first + number // across
                    x = x_first + number % across
                    value = _resized(heatmap, y, x, y_scale, x_scale, H, W)
                    number = y * columns + x
                    better = (value > best) | ((value == best) & (number < index))
                    best = tl.where(better, value, best)
                    index = tl.where(better, number, index)
                threshold = tl.maximum(threshold, tl.max(best, 0) - slack)
                remaining = (bound >= threshold) & (lane <= W) & (lane > cell_x)
                cell_x = tl.min(tl.where(remaining, lane, COLUMNS), 0)
        upper1, upper2 = upper2, upper3
        lower0, lower1, lower2 = lower1, lower2, lower3

    score = tl.where(finite, tl.max(best, 0), float("nan"))
    winner = tl.where(finite, tl.min(tl.where(best == score, index, MAX_SIDE * MAX_SIDE), 0), 0)
    keypoint = keypoints + program * 3
    tl.store(keypoint, x1 + ((winner % columns).to(COMPUTE) + 0.5) * divide(width, columns.to(COMPUTE)))
    tl.store(keypoint + 1, y1 + ((winner // columns).to(COMPUTE) + 0.5) * divide(height, rows.to(COMPUTE)))
    if PROBABILITY:
        total = tl.zeros((SCAN,), COMPUTE)
        for first in range(0, H * W, SCAN):
            place = first + tl.arange(0, SCAN)
            logit = tl.load(heatmap + place, mask=place < H * W, other=-float("inf")).to(COMPUTE)
            total += tl.exp(logit - score)
        tl.store(keypoint + 2, score)
        tl.store(scores + program, divide(tl.full((), 1.0, COMPUTE), tl.sum(total, 0)))
    else:
        tl.store(keypoint + 2, tl.full((), 1.0, COMPUTE))
        tl.store(scores + program, score)


@lru_cache(maxsize=64)
def _prepared(points: int, height: int, width: int, convention: str, dtype: torch.dtype, device: Any) -> Launch:
    del device  # the current one, on whose backend the options depend
    limit = {"maxnreg": MAX_REGISTERS} if target_backend() == "cuda" else {}
    return Launch(
        _decode_keypoints_kernel,
        P=points,
        H=height,
        W=width,
        COLUMNS=next_power_of_2(width + 1),
        SCAN=min(next_power_of_2(height * width), SCAN),
        STEP=PIXELS_PER_STEP,
        PROBABILITY=convention == "detectron2",
        COMPUTE=triton_dtype(dtype),
        MAX_SIDE=MAX_SIDE,
        EXCESS=EXCESS,
        SLACK=SLACK[compute_dtype(dtype)],
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
        **limit,
    )


def launch_decode_keypoints(heatmaps: Tensor, boxes: Tensor, convention: str) -> tuple[Tensor, Tensor]:
    count, points, height, width = heatmaps.shape
    dtype = compute_dtype(heatmaps.dtype)
    keypoints = torch.empty((count, points, 3), dtype=dtype, device=heatmaps.device)
    scores = torch.empty((count, points), dtype=dtype, device=heatmaps.device)
    if scores.numel():
        with on_device_of(heatmaps):
            launch = _prepared(points, height, width, convention, heatmaps.dtype, current_device())
            launch((count * points,), heatmaps.contiguous(), boxes.contiguous(), keypoints, scores)
    return keypoints, scores
