"""Where RoIPool's bins lie: the geometry that its reference, its forward and its backward share.

    x1, y1, x2, y2 = round(box * spatial_scale)            halves away from zero, as C's round does
    width          = max(x2 - x1 + 1, 1)                   both ends are pixels of the RoI
    columns(q)     = x1 + floor(q * width / PW) up to x1 + ceil((q + 1) * width / PW) - 1

clipped to the feature map, and rows likewise. The operations are torchvision's, in its order. The level of a box is
chosen from its area in image pixels, before it is rounded; `spatial_scale` is that level's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import divide_by_constant, float_of, jit, tl, triton_dtype
from fastmask.kernels.roi_align.geometry import level_of, size_of
from fastmask.kernels.roi_align.levels import PyramidSpec, thresholds_of


def levels_of_boxes(boxes: Tensor, spec: PyramidSpec) -> Tensor:
    """Index `[K]` into the pyramid of each box `[K, 5]`, int64, as kernels find it; -1 for a box that has no level.

    One level takes every box. With more, a box of negative area or with a side that is not finite has no level.
    """
    level = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    if len(spec.spatial_scales) == 1:
        return level
    side = boxes[:, 3:] - boxes[:, 1:3]
    area = side[:, 0] * side[:, 1]
    bits = torch.tensor(thresholds_of(spec, boxes.dtype) or (), dtype=torch.int64, device="cpu")
    for threshold in bits.view(torch.float64).tolist():  # numbers of the dtype of areas
        level += area >= threshold
    has_level = side.isfinite().all(1) & (area >= 0) & (level < len(spec.spatial_scales))
    return level.where(has_level, -1)


def quantise(boxes: Tensor, spatial_scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First column and row, width and height in pixels of the feature map, int64 `[K]`, of boxes `[K, 5]`.

    `spatial_scale` is a number or a tensor `[K, 1]`. A box with a coordinate that is not finite has width and height
    0; any other has at least 1.
    """
    scaled = boxes[:, 1:] * spatial_scale
    finite = scaled.isfinite().all(1)
    scaled = scaled.where(finite[:, None], 0).clamp(-(2.0**61), 2.0**61)  # sums of two still fit int64
    whole = scaled.trunc()  # floor(x + 0.5) is not enough: the addition rounds 0.49999997 up to 1
    whole = whole + ((scaled - whole).abs() >= 0.5) * scaled.sign()
    x1, y1, x2, y2 = whole.long().unbind(1)
    return x1, y1, (x2 - x1 + 1).clamp(min=1) * finite, (y2 - y1 + 1).clamp(min=1) * finite


def bin_spans(start: Tensor, size: Tensor, pooled: int, limit: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """First pixel and number of pixels, int64 `[K, pooled]`, of the bins along an axis of `limit` pixels."""
    bin_size = size.to(dtype)[:, None] / pooled
    edge = torch.arange(pooled + 1, dtype=dtype, device=start.device)
    first = ((edge[:-1] * bin_size).floor().long() + start[:, None]).clamp(0, limit)
    end = ((edge[1:] * bin_size).ceil().long() + start[:, None]).clamp(0, limit)
    return first, end - first


def lowest_feature(dtype: torch.dtype) -> float:
    """Only features above it win. It is float32's lowest for float64 too, as in torchvision."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def position_dtype(levels: Sequence[tuple[int, int]], dtype: torch.dtype) -> Any:
    """The kernels' type of pixel positions: float32 holds those of sides up to 2^24."""
    return triton_dtype(dtype if max(max(level) for level in levels) <= 1 << 24 else torch.float64)


@jit()
def _round_half_away(x):
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude < 2.0**61, magnitude, 2.0**61)  # for NaN too: its conversion is undefined
    whole = tl.floor(magnitude)
    whole += (magnitude - whole >= 0.5).to(x.dtype)
    return tl.where(x < 0, -whole, whole)


@jit()
def _bin_size(start, end, pooled, BINS: tl.constexpr, COMPUTE: tl.constexpr):
    pixels = end.to(tl.int64) - start.to(tl.int64) + 1
    size = tl.where(pooled, tl.maximum(pixels, 1), 0).to(COMPUTE)
    return divide_by_constant(size, BINS)


class Window(NamedTuple):
    """The rounded boxes of RoIs, as kernels hold them. One that is not pooled has image -1 and bins of size 0."""

    image: Any
    level: Any
    height: Any  # pixels of the level
    width: Any
    top: Any  # first row, a whole number
    left: Any
    bin_height: Any
    bin_width: Any


@jit()
def window_of(
    box, num_images, sizes, scales, PH: tl.constexpr, PW: tl.constexpr, THRESHOLDS: tl.constexpr, COMPUTE: tl.constexpr
):
    """The `Window` of the boxes `[image, x1, y1, x2, y2]` at `box`."""
    image = tl.load(box)
    level = tl.full(image.shape, 0, tl.int32)
    pooled = (image >= 0) & (image < num_images)
    if len(sizes) > 1:  # a single level also takes boxes whose sides overflow
        _, level, pooled = level_of(box, num_images, THRESHOLDS, len(sizes))
    packed, scale = sizes[0], float_of(scales[0], COMPUTE)
    for index in tl.static_range(1, len(sizes)):
        packed = tl.where(level == index, sizes[index], packed)
        scale = tl.where(level == index, float_of(scales[index], COMPUTE), scale)
    height, width = size_of(packed)
    x1, y1 = tl.load(box + 1) * scale, tl.load(box + 2) * scale
    x2, y2 = tl.load(box + 3) * scale, tl.load(box + 4) * scale
    pooled &= (x1 - x1 == 0) & (y1 - y1 == 0) & (x2 - x2 == 0) & (y2 - y2 == 0)  # finite
    left, top = _round_half_away(x1), _round_half_away(y1)
    bin_width = _bin_size(left, _round_half_away(x2), pooled, PW, COMPUTE)
    bin_height = _bin_size(top, _round_half_away(y2), pooled, PH, COMPUTE)
    return Window(tl.where(pooled, image, -1.0).to(tl.int32), level, height, width, top, left, bin_height, bin_width)


@jit()
def bin_edges(bin, start, bin_size, limit, POSITION: tl.constexpr):
    """First pixel of the bin and the one after its last, clipped to `limit` pixels.

    Sums of whole numbers of type POSITION are exact where they are in [0, limit], and others are clipped.
    """
    start, last = start.to(POSITION), limit.to(POSITION)
    first = tl.floor(bin * bin_size).to(POSITION) + start
    end = tl.ceil((bin + 1) * bin_size).to(POSITION) + start
    first, end = tl.minimum(tl.maximum(first, 0.0), last), tl.minimum(tl.maximum(end, 0.0), last)
    return first.to(tl.int32), end.to(tl.int32)
