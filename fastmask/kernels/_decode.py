"""What the selections of proposals and of detections share: boxes decoded, clipped to their image, and filtered.

    w, h = x2 - x1, y2 - y1                                      of the anchor (x1, y1, x2, y2)
    cx, cy = x1 + w / 2 + dx / wx * w, y1 + h / 2 + dy / wy * h
    box = (cx - w', cy - h', cx + w', cy + h') with w' = exp(min(dw / ww, log(1000 / 16))) * w / 2, h' likewise

limited to the image, (0, 0) to (width, height). A box takes part if both sides are long enough. One with a NaN
coordinate never does: no comparison holds. The reference is `box_ops.decode` and `box_ops.clip`. Kernels do the same
operations in the same order, and differ by the rounding of `exp`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmask import box_ops
from fastmask.kernels._runtime import divide, divide_by_reciprocal, float64_bits, jit, tl, triton
from fastmask.kernels._validation import check_flag, check_float, check_sequence

_MAX_LOG_SCALE = triton and triton.language.constexpr(box_ops.MAX_LOG_SCALE)


class DecodeSpec(Protocol):
    """The settings of decoding and of the filter, as public functions document them."""

    @property
    def weights(self) -> Sequence[float]: ...

    @property
    def min_size(self) -> float: ...

    @property
    def min_size_inclusive(self) -> bool: ...

    @property
    def drop_non_finite(self) -> bool: ...


def decode_and_filter(deltas: Tensor, anchors: Tensor, image_sizes: Tensor, spec: DecodeSpec) -> tuple[Tensor, Tensor]:
    """Boxes `[..., 4]`, clipped, and whether they take part, boolean `[...]`; the three tensors are broadcast."""
    boxes = box_ops.decode(deltas, anchors, spec.weights)
    clipped = box_ops.clip(boxes, image_sizes.to(boxes.dtype))
    sides = clipped[..., 2:] - clipped[..., :2]
    takes_part = (sides >= spec.min_size if spec.min_size_inclusive else sides > spec.min_size).all(-1)
    return clipped, takes_part & boxes.isfinite().all(-1) if spec.drop_non_finite else takes_part


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """Of the results: float64 where an input is, otherwise float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in inputs) else torch.float32


@jit()
def _unweighted(delta, WEIGHT: tl.constexpr):
    """`delta / WEIGHT`: to the bit where the quotient is not below 2^-60, without a branch for weights from 1 on."""
    if WEIGHT == 1.0:
        return delta
    if WEIGHT < 1.0:
        return divide(delta, tl.full((), WEIGHT, delta.dtype))
    return tl.where(tl.abs(delta) < float("inf"), divide_by_reciprocal(delta, WEIGHT, 1.0 / WEIGHT), delta)


@jit()
def _span(start, end, shift, log_scale, SHIFT_WEIGHT: tl.constexpr, SCALE_WEIGHT: tl.constexpr):
    """The decoded box along one axis."""
    size = end - start
    centre = start + 0.5 * size + _unweighted(shift, SHIFT_WEIGHT) * size
    log_scale = _unweighted(log_scale, SCALE_WEIGHT)
    limit = tl.full((), _MAX_LOG_SCALE, log_scale.dtype)
    half = 0.5 * tl.exp(tl.where(log_scale > limit, limit, log_scale)) * size  # NaN stays NaN
    return centre - half, centre + half


@jit()
def decode_box(anchor, delta, WEIGHTS: tl.constexpr):
    """The box `(x1, y1, x2, y2)` of an anchor and its `(dx, dy, dw, dh)`, before it is clipped."""
    x1, x2 = _span(anchor[0], anchor[2], delta[0], delta[2], WEIGHTS[0], WEIGHTS[2])
    y1, y2 = _span(anchor[1], anchor[3], delta[1], delta[3], WEIGHTS[1], WEIGHTS[3])
    return x1, y1, x2, y2


@jit()
def is_finite(box):
    """Whether all coordinates are finite."""
    inf = float("inf")
    return (tl.abs(box[0]) < inf) & (tl.abs(box[1]) < inf) & (tl.abs(box[2]) < inf) & (tl.abs(box[3]) < inf)


@jit()
def _clip(x, limit):
    x = tl.where(x < 0, 0.0, x)
    return tl.where(x > limit, limit, x)  # NaN stays NaN


@jit()
def clip_box(box, height, width):
    """The box limited to its image."""
    return _clip(box[0], width), _clip(box[1], height), _clip(box[2], width), _clip(box[3], height)


@jit()
def is_large(box, min_size, INCLUSIVE: tl.constexpr):
    """Whether both sides are long enough; False if one is NaN."""
    width, height = box[2] - box[0], box[3] - box[1]
    if INCLUSIVE:
        return (width >= min_size) & (height >= min_size)
    return (width > min_size) & (height > min_size)


@jit()
def load_four(pointer, index, mask, COMPUTE: tl.constexpr):
    """Row `index` of `[..., 4]`: a box or its deltas."""
    row = pointer + index * 4
    return (
        tl.load(row, mask=mask, other=0.0).to(COMPUTE),
        tl.load(row + 1, mask=mask, other=0.0).to(COMPUTE),
        tl.load(row + 2, mask=mask, other=0.0).to(COMPUTE),
        tl.load(row + 3, mask=mask, other=0.0).to(COMPUTE),
    )


@jit()
def store_four(pointer, index, box, mask):
    row = pointer + index * 4
    tl.store(row, box[0], mask=mask)
    tl.store(row + 1, box[1], mask=mask)
    tl.store(row + 2, box[2], mask=mask)
    tl.store(row + 3, box[3], mask=mask)


@jit()
def logistic(x):
    """1 / (1 + exp(-x)); dividing to 2 ulp needs no branch."""
    return 1.0 / (1.0 + tl.exp(-x))


def decode_constants(spec: DecodeSpec) -> dict[str, Any]:
    """The constants of a kernel that decodes."""
    return {
        "WEIGHTS": tuple(spec.weights),
        "INCLUSIVE": spec.min_size_inclusive,
        "DROP_NON_FINITE": spec.drop_non_finite,
    }


def min_size_bits(spec: DecodeSpec) -> int:
    return float64_bits(spec.min_size)


def check_decode_options(weights: Any, min_size: Any, min_size_inclusive: Any, drop_non_finite: Any) -> dict[str, Any]:
    """The fields of a `DecodeSpec` by name, checked; a `min_size` of None filters nothing but NaN."""
    checked = [check_float("weights", weight) for weight in check_sequence("weights", weights, "4 numbers")]
    if len(checked) != 4 or not all(0 < abs(weight) < math.inf for weight in checked):
        raise ValueError(f"weights: expected 4 finite numbers other than 0, got {weights}")
    size = -math.inf if min_size is None else check_float("min_size", min_size)
    if not size <= math.inf:
        raise ValueError(f"min_size: expected a number, got {min_size}")
    return {
        "weights": checked,
        "min_size": size,
        "min_size_inclusive": check_flag("min_size_inclusive", min_size_inclusive),
        "drop_non_finite": check_flag("drop_non_finite", drop_non_finite),
    }


def check_image_sizes(image_sizes: Tensor, batch: int) -> None:
    if image_sizes.shape != (batch, 2):
        raise ValueError(f"image_sizes: expected [{batch}, 2], got {list(image_sizes.shape)}")
