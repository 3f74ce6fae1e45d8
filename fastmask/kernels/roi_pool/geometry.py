"""Where RoIPool's bins lie: the geometry that its reference, its forward and its backward share.

    x1, y1, x2, y2 = round(box * spatial_scale)            halves away from zero, as C's round does
    width          = max(x2 - x1 + 1, 1)                   both ends are pixels of the RoI
    columns(q)     = x1 + floor(q * width / PW) up to x1 + ceil((q + 1) * width / PW) - 1

clipped to the feature map, and rows likewise. The operations are torchvision's, in its order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.kernels._runtime import divide, float_of, jit, tl


def quantise(boxes: Tensor, spatial_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First column and row, width and height in pixels of the feature map, int64 `[K]`, of boxes `[K, 5]`.

    A box with a coordinate that is not finite has width and height 0; any other has at least 1.
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


@jit()
def _round_half_away(x):
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude < 2.0**61, magnitude, 2.0**61)  # for NaN too: its conversion is undefined
    whole = tl.floor(magnitude)
    whole += (magnitude - whole >= 0.5).to(x.dtype)
    return tl.where(x < 0, -whole, whole).to(tl.int64)


@jit()
def _bin_size(start, end, finite, POOLED: tl.constexpr, COMPUTE: tl.constexpr):
    size = tl.where(finite, tl.maximum(end - start + 1, 1), 0).to(COMPUTE)
    return divide(size, POOLED * 1.0)


@jit()
def windows(boxes, k, num_boxes, num_images, scale_bits, PH: tl.constexpr, PW: tl.constexpr, COMPUTE: tl.constexpr):
    """Image, left, top, bin width and bin height of RoIs k; image -1 and empty bins for a RoI that is not pooled."""
    scale = float_of(scale_bits, COMPUTE)
    known = k < num_boxes
    box = boxes + k.to(tl.int64) * 5
    image = tl.load(box, mask=known, other=-1.0)
    x1 = tl.load(box + 1, mask=known, other=0.0).to(COMPUTE) * scale
    y1 = tl.load(box + 2, mask=known, other=0.0).to(COMPUTE) * scale
    x2 = tl.load(box + 3, mask=known, other=0.0).to(COMPUTE) * scale
    y2 = tl.load(box + 4, mask=known, other=0.0).to(COMPUTE) * scale
    finite = (x1 - x1 == 0) & (y1 - y1 == 0) & (x2 - x2 == 0) & (y2 - y2 == 0)
    finite = finite & (image >= 0) & (image < num_images)
    left, top = _round_half_away(x1), _round_half_away(y1)
    bin_width = _bin_size(left, _round_half_away(x2), finite, PW, COMPUTE)
    bin_height = _bin_size(top, _round_half_away(y2), finite, PH, COMPUTE)
    return tl.where(finite, image, -1.0).to(tl.int32), left, top, bin_width, bin_height


@jit()
def bin_edges(bin, start, bin_size, limit):
    """First pixel of the bin and the one after its last, clipped to `limit` pixels."""
    first = tl.floor(bin.to(bin_size.dtype) * bin_size).to(tl.int64) + start
    end = tl.ceil((bin + 1).to(bin_size.dtype) * bin_size).to(tl.int64) + start
    first = tl.minimum(tl.maximum(first, 0), limit)
    return first.to(tl.int32), tl.minimum(tl.maximum(end, 0), limit).to(tl.int32)
