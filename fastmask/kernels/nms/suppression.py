"""What both algorithms on the device share: the boxes as kernels read them, and the test "a suppresses b".

The test is `fl(i / u) > t`, the intersection over the union rounded to float32. A division is about a dozen
instructions and a branch, so float32 boxes are compared without one, and with the same result for every input:

    x = fl(i - t * u)  (one fused multiply-add),    suppressed iff x > h * u,    h = half the gap above t

Proof, for the values that `suppresses` passes:

- If i > 0, both boxes have positive areas a and b, i <= min(a, b) because rounding is monotonic, and
  u >= max(a, b) / 2. Otherwise, or if anything is NaN or u is infinite, x is at most 0 or NaN, and so is the quotient.
  The absolute value in the union changes it only if i = 0: it makes the union of inverted boxes positive, so that
  x <= 0.
- fl(i / u) > t iff i / u exceeds the midpoint t + h. Equality is impossible: the midpoint times u has an odd factor
  of 25 bits, i has 24.
- If i - t * u is in [0, 2 * h * u], it is a float32, hence exact: it is a multiple of ulp(t) * ulp(u), and at most
  2^24 times that. Elsewhere, rounding does not carry it to the other side of h * u.
- Nothing underflows: t >= 2^-30 (else `needs_division`), and where a is below 2^-60, i and u are scaled by 2^64. If u
  then overflows, i / u < 2^-120.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import INTERPRETED, divide, float64_bits, float_of, jit, tl
from fastmask.kernels.nms.reference import round_down_float32


class Candidates(NamedTuple):
    """The boxes of B segments and their order."""

    boxes: Tensor  # [B, N, 4], contiguous
    classes: Tensor | None  # [B, N], contiguous
    order: Tensor  # [B, N] int64: indices by falling score
    num_valid: Tensor | None  # [B] int64: the length of the prefix of `order` that takes part; None: all of it


@lru_cache(maxsize=1024)
def threshold_bits(iou_threshold: float, dtype: torch.dtype) -> int:
    """The threshold for boxes of `dtype`, as `float_of` reads it."""
    return float64_bits(iou_threshold if dtype == torch.float64 else round_down_float32(iou_threshold))


def needs_division(iou_threshold: float, dtype: torch.dtype) -> bool:
    """Whether IoUs are divided: float64 boxes, and thresholds whose products with a union could underflow."""
    return dtype == torch.float64 or iou_threshold < 2.0**-30


@jit()
def load_threshold(threshold_bits, COMPUTE: tl.constexpr):
    """The threshold and, for `suppresses` without division, half the gap between it and its successor."""
    threshold = float_of(threshold_bits, COMPUTE)
    exponent = threshold.to(tl.float32).to(tl.int32, bitcast=True) >> 23
    return threshold, ((exponent - 24) << 23).to(tl.float32, bitcast=True)


@jit()
def load_box(boxes, classes, index, mask, COMPUTE: tl.constexpr):
    """Corners and class. Where `mask` is False the corners are NaN, so that the box suppresses nothing."""
    box = boxes + index * 4
    other = None if mask is None else float("nan")
    x1 = tl.load(box, mask=mask, other=other).to(COMPUTE)
    y1 = tl.load(box + 1, mask=mask, other=other).to(COMPUTE)
    x2 = tl.load(box + 2, mask=mask, other=other).to(COMPUTE)
    y2 = tl.load(box + 3, mask=mask, other=other).to(COMPUTE)
    return x1, y1, x2, y2, index * 0 if classes is None else tl.load(classes + index, mask=mask)


@jit()
def store_box(boxes, classes, index, box, mask):
    tl.store(boxes + index * 4, box[0], mask=mask)
    tl.store(boxes + index * 4 + 1, box[1], mask=mask)
    tl.store(boxes + index * 4 + 2, box[2], mask=mask)
    tl.store(boxes + index * 4 + 3, box[3], mask=mask)
    if classes is not None:
        tl.store(classes + index, box[4], mask=mask)


@jit()
def _fma_compiled(x, y, z):
    return tl.fma(x, y, z)


@jit()
def _fma_interpreted(x, y, z):
    return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)


# `x * y + z`, rounded once. Triton's interpreter rounds `tl.fma` twice; in float64 the product is exact.
_fma = _fma_interpreted if INTERPRETED else _fma_compiled


@jit()
def suppresses(a, b, threshold, DIVIDE: tl.constexpr):
    """IoU(a, b) > threshold, and the classes are equal; a comparison with NaN is False."""
    width = tl.maximum(tl.minimum(a[2], b[2]) - tl.maximum(a[0], b[0]), 0.0)
    height = tl.maximum(tl.minimum(a[3], b[3]) - tl.maximum(a[1], b[1]), 0.0)
    intersection = width * height
    area = (a[2] - a[0]) * (a[3] - a[1])
    total = area + (b[2] - b[0]) * (b[3] - b[1])
    if DIVIDE:
        hit = divide(intersection, total - intersection) > threshold[0]
    else:  # exact, as the docstring of this file proves
        scale = tl.where(area < 2.0**-60, 2.0**64, 1.0)
        intersection *= scale
        union = _fma(tl.abs(total), scale, -intersection)
        hit = _fma(-threshold[0], union, intersection) > threshold[1] * union
    return hit & (a[4] == b[4])


@jit()
def suppresses_pairs(a, b, threshold, DIVIDE: tl.constexpr):
    """`suppresses` for every pair, `[len(a), len(b)]`."""
    row = (a[0][:, None], a[1][:, None], a[2][:, None], a[3][:, None], a[4][:, None])
    column = (b[0][None, :], b[1][None, :], b[2][None, :], b[3][None, :], b[4][None, :])
    return suppresses(row, column, threshold, DIVIDE)


@jit()
def suppressed_by_kept(
    box,
    boxes,
    classes,
    size,
    threshold,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    """Which of ROWS boxes are suppressed by the first `size` of the kept `boxes`, read STEP at a time."""
    hit = tl.zeros((ROWS, STEP), tl.int1)  # reduced once, after the loop
    for first in range(0, size, STEP):
        position = first + tl.arange(0, STEP)
        hit |= suppresses_pairs(box, load_box(boxes, classes, position, position < size, COMPUTE), threshold, DIVIDE)
    return tl.max(hit.to(tl.int32), 1) != 0
