"""Box algebra in plain torch. Boxes are `(x1, y1, x2, y2)`, continuous pixel coordinates, x2 and y2 exclusive.

Boxes are floating or integer tensors with the coordinates in their last dimension. `encode` and `decode` convert
integers to float32. `area` and `iou` compute in float32 for half precision, in int64 for int64, uint32 and uint64, and
in int32 for all other integers. All functions are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import (
    check_float,
    check_pair,
    check_same_device,
    check_sequence,
    check_tensor,
)

# A predicted side is at most 1000 / 16 times its anchor's, so that `exp` cannot overflow; training stays far below.
MAX_LOG_SCALE = math.log(1000 / 16)

MAX_FLOAT16 = 65504  # `clamp` takes no limit beyond the range of its tensor


@overridable
def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Regression targets that turn `anchors` into `boxes` (Girshick et al. 2014, appendix C).

    Args:
        boxes: `[..., 4]`, of positive size, in any one unit.
        anchors: `[..., 4]`, of positive size, in the unit of `boxes`, broadcast against `boxes`.
        weights: factors of dx, dy, dw and dh.

    Returns:
        `[..., 4]`, floating: `(dx, dy)` in anchor sizes, `(dw, dh)` logarithms of the ratio of sizes, times `weights`.

    Raises:
        ValueError: shapes or devices do not match, or there are not four `weights`.
        TypeError: `boxes` or `anchors` is not a dense tensor of numbers, or `weights` are not numbers.
    """
    _check_boxes("boxes", boxes)
    _check_boxes("anchors", anchors)
    _check_broadcasts("anchors", anchors, "boxes", boxes, dims=1)
    weights = _checked_weights(weights)
    boxes, anchors = _floating(boxes), _floating(anchors)
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centre, anchor_centre = boxes[..., :2] + 0.5 * size, anchors[..., :2] + 0.5 * anchor_size
    deltas = torch.cat([(centre - anchor_centre) / anchor_size, (size / anchor_size).log()], -1)
    return torch.stack([delta * weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True)], -1)


@overridable
def decode(deltas: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The inverse of `encode`.

    Args:
        deltas: `[..., 4]`, `(dx, dy, dw, dh)`; dw and dh are limited to `MAX_LOG_SCALE`.
        anchors: `[..., 4]`, broadcast against `deltas`.
        weights: as given to `encode`.

    Returns:
        Boxes `[..., 4]`, floating, in the unit of `anchors`.

    Raises:
        ValueError: shapes or devices do not match, or there are not four `weights`.
        TypeError: `deltas` or `anchors` is not a dense tensor of numbers, or `weights` are not numbers.
    """
    _check_boxes("deltas", deltas)
    _check_boxes("anchors", anchors)
    _check_broadcasts("anchors", anchors, "deltas", deltas, dims=1)
    weights = _checked_weights(weights)
    deltas, anchors = _floating(deltas), _floating(anchors)
    deltas = torch.stack([delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True)], -1)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * anchor_size + deltas[..., :2] * anchor_size
    half = 0.5 * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * anchor_size
    return torch.cat([centre - half, centre + half], -1)


@overridable
def clip(boxes: Tensor, image_size: tuple[int, int] | Tensor) -> Tensor:
    """Boxes limited to their image.

    Args:
        boxes: `[..., 4]`.
        image_size: `(height, width)` in pixels, or a tensor `[..., 2]` of them, broadcast against the dimensions of
            `boxes` before the last one.

    Returns:
        Boxes `[..., 4]`; integer boxes keep their dtype.

    Raises:
        ValueError: shapes or devices do not match, or `image_size` is negative.
        TypeError: `boxes` is not a dense tensor of numbers, or `image_size` is neither two ints nor such a tensor.
    """
    _check_boxes("boxes", boxes)
    if isinstance(image_size, Tensor):
        _check_last_dimension("image_size", image_size, 2)
        _check_broadcasts("image_size", image_size, "boxes", boxes, dims=1)
        image_size = _upcast_integers(image_size)
        height, width = image_size[..., :1], image_size[..., 1:]
    else:
        height, width = check_pair("image_size", image_size, least=0)
        if boxes.dtype == torch.float16:
            height, width = min(height, MAX_FLOAT16), min(width, MAX_FLOAT16)
    corners = _upcast_integers(boxes)
    x, y = corners[..., ::2].clamp(min=0).clamp(max=width), corners[..., 1::2].clamp(min=0).clamp(max=height)
    clipped = torch.stack([x, y], -1).flatten(-2)
    return clipped if boxes.is_floating_point() else clipped.to(boxes.dtype)


@overridable
def area(boxes: Tensor) -> Tensor:
    """Areas of boxes, `(x2 - x1) * (y2 - y1)`, as `torchvision.ops.box_area`.

    Args:
        boxes: `[..., 4]`, in any one unit.

    Returns:
        `[...]`, in the squared unit; negative for a box with one inverted side.

    Raises:
        ValueError: `boxes` has another shape.
        TypeError: `boxes` is not a dense tensor of numbers.
    """
    _check_boxes("boxes", boxes)
    return _area(_upcast(boxes))


@overridable
def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of all pairs, as `torchvision.ops.box_iou`.

    Args:
        boxes: `[..., N, 4]`, in any one unit.
        others: `[..., M, 4]`, in the unit of `boxes`; dimensions before the last two are broadcast.

    Returns:
        `[..., N, M]`, floating; NaN where both areas are 0.

    Raises:
        ValueError: shapes or devices do not match.
        TypeError: `boxes` or `others` is not a dense tensor of numbers.
    """
    _check_boxes("boxes", boxes)
    _check_boxes("others", others)
    for name, tensor in (("boxes", boxes), ("others", others)):
        if tensor.ndim < 2:
            raise ValueError(f"{name}: expected [..., N, 4], got {list(tensor.shape)}")
    _check_broadcasts("others", others, "boxes", boxes, dims=2)
    boxes, others = _upcast(boxes)[..., :, None, :], _upcast(others)[..., None, :, :]
    low = boxes[..., :2].maximum(others[..., :2])
    width, height = (boxes[..., 2:].minimum(others[..., 2:]) - low).clamp(min=0).unbind(-1)
    intersection = width * height
    return intersection / (_area(boxes) + _area(others) - intersection)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _floating(boxes: Tensor) -> Tensor:
    return boxes if boxes.is_floating_point() else boxes.float()


def _upcast(boxes: Tensor) -> Tensor:
    """To a dtype that holds areas: half precision holds neither the area of a large box nor the difference of two."""
    return boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else _upcast_integers(boxes)


def _upcast_integers(boxes: Tensor) -> Tensor:
    """Integers to int32 or int64; floating boxes as they are."""
    if boxes.is_floating_point() or boxes.dtype in (torch.int32, torch.int64):
        return boxes
    return boxes.to(torch.int64 if boxes.itemsize >= 4 else torch.int32)


def _check_boxes(name: str, boxes: Tensor) -> None:
    _check_last_dimension(name, boxes, 4)


def _check_last_dimension(name: str, tensor: Tensor, size: int) -> None:
    check_tensor(name, tensor, real=True)
    if tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected a floating or an integer dtype, got {tensor.dtype}")
    if tensor.ndim < 1 or tensor.shape[-1] != size:
        raise ValueError(f"{name}: expected [..., {size}], got {list(tensor.shape)}")


def _check_broadcasts(name: str, tensor: Tensor, other_name: str, other: Tensor, dims: int) -> None:
    """On one device, and broadcastable in all dimensions but the last `dims`."""
    pairs = zip(reversed(tensor.shape[:-dims]), reversed(other.shape[:-dims]), strict=False)
    if any(size != other_size and size != 1 and other_size != 1 for size, other_size in pairs):
        expected = f"a shape that broadcasts with {other_name}, {list(other.shape)}"
        raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")
    check_same_device(name, tensor, other_name, other)


def _checked_weights(weights: Sequence[float]) -> list[float]:
    checked = [check_float("weights", weight) for weight in check_sequence("weights", weights, "4 numbers")]
    if len(checked) != 4:
        raise ValueError(f"weights: expected 4 numbers, got {len(checked)}")
    return checked
