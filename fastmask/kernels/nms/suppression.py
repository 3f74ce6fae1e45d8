"""What both algorithms on the device share: the boxes as kernels read them, and the test "a suppresses b".

Kernels read boxes and classes through `order`, the sorted indices. Gathering them first would cost a launch each
and save little, since a box is 16 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import divide, float64_bits, jit, tl
from fastmask.kernels.nms.reference import round_down_float32


class Candidates(NamedTuple):
    """The first four arguments of kernels that read boxes."""

    boxes: Tensor  # [B, N, 4], contiguous
    classes: Tensor | None  # [B, N], contiguous
    order: Tensor  # [B, N] int64: indices by falling score
    num_valid: Tensor  # [B] int64: the length of the prefix of `order` that takes part


def threshold_bits(iou_threshold: float, dtype: torch.dtype) -> int:
    """The threshold for boxes of `dtype`, as `float_of` reads it."""
    return float64_bits(iou_threshold if dtype == torch.float64 else round_down_float32(iou_threshold))


@jit()
def load_box(boxes, classes, index, mask, COMPUTE: tl.constexpr):
    """Corners and class. Where `mask` is False they are arbitrary."""
    box = boxes + index * 4
    x1 = tl.load(box, mask=mask).to(COMPUTE)
    y1 = tl.load(box + 1, mask=mask).to(COMPUTE)
    x2 = tl.load(box + 2, mask=mask).to(COMPUTE)
    y2 = tl.load(box + 3, mask=mask).to(COMPUTE)
    return x1, y1, x2, y2, index * 0 if classes is None else tl.load(classes + index, mask=mask)


@jit()
def suppresses(a, b, threshold):
    """IoU(a, b) > threshold, and the classes are equal; a comparison with NaN is False."""
    width = tl.maximum(tl.minimum(a[2], b[2]) - tl.maximum(a[0], b[0]), 0.0)
    height = tl.maximum(tl.minimum(a[3], b[3]) - tl.maximum(a[1], b[1]), 0.0)
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return (divide(intersection, union) > threshold) & (a[4] == b[4])


@jit()
def suppresses_pairs(a, b, threshold):
    """`suppresses` for every pair, `[len(a), len(b)]`."""
    row = (a[0][:, None], a[1][:, None], a[2][:, None], a[3][:, None], a[4][:, None])
    column = (b[0][None, :], b[1][None, :], b[2][None, :], b[3][None, :], b[4][None, :])
    return suppresses(row, column, threshold)


@jit()
def suppressed_by_kept(
    box,
    boxes,
    classes,
    kept,
    begin,
    end,
    threshold,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Which of ROWS boxes are suppressed by the boxes of index `kept[begin:end]`, read STEP at a time."""
    hit = tl.zeros((ROWS, STEP), tl.int1)  # reduced once, after the loop
    for first in range(begin, end, STEP):
        position = first + tl.arange(0, STEP)
        index = tl.load(kept + position, mask=position < end, other=0)
        other = load_box(boxes, classes, index, position < end, COMPUTE)
        hit |= suppresses_pairs(box, other, threshold) & (position < end)[None, :]
    return tl.max(hit.to(tl.int32), 1) != 0
