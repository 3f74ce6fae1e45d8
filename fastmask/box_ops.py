"""Box algebra in plain torch. Boxes are `(x1, y1, x2, y2)`, continuous pixel coordinates, x2 and y2 exclusive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A predicted side is at most 1000 / 16 times its anchor's: the logarithm that no training reaches, and exp survives.
MAX_LOG_SCALE = math.log(1000 / 16)


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Regression targets that turn `anchors` into `boxes` (Girshick et al. 2014, appendix C).

    Args:
        boxes, anchors: `[..., 4]`, of positive size.
        weights: factors of dx, dy, dw and dh.

    Returns:
        `[..., 4]`: `(dx, dy)` in anchor sizes, `(dw, dh)` logarithms of the ratio of sizes, times `weights`.
    """
    _check(boxes, "boxes")
    _check(anchors, "anchors")
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centre, anchor_centre = boxes[..., :2] + 0.5 * size, anchors[..., :2] + 0.5 * anchor_size
    deltas = torch.cat([(centre - anchor_centre) / anchor_size, (size / anchor_size).log()], -1)
    return torch.stack([delta * weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True)], -1)


def decode(deltas: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The inverse of `encode`.

    Args:
        deltas: `[..., 4]`; dw and dh are limited to `MAX_LOG_SCALE`.
        anchors: `[..., 4]`, broadcast against `deltas`.
        weights: as given to `encode`.

    Returns:
        Boxes `[..., 4]`.
    """
    _check(deltas, "deltas")
    _check(anchors, "anchors")
    deltas = torch.stack([delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True)], -1)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * anchor_size + deltas[..., :2] * anchor_size
    half = 0.5 * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * anchor_size
    return torch.cat([centre - half, centre + half], -1)


def clip(boxes: Tensor, image_size: tuple[int, int] | Tensor) -> Tensor:
    """Boxes `[..., 4]` limited to an image of `(height, width)` pixels, or to images of `[..., 2]`, broadcast."""
    _check(boxes, "boxes")
    if isinstance(image_size, Tensor):
        if not image_size.ndim or image_size.shape[-1] != 2:
            raise ValueError(f"image_size: expected [..., 2], got {list(image_size.shape)}")
        height, width = image_size[..., :1], image_size[..., 1:]
    else:
        height, width = image_size
    x, y = boxes[..., ::2].clamp(min=0).clamp(max=width), boxes[..., 1::2].clamp(min=0).clamp(max=height)
    return torch.stack([x, y], -1).flatten(-2)


def area(boxes: Tensor) -> Tensor:
    """Areas `[...]` of boxes `[..., 4]`, square pixels; in float32 for half-precision boxes."""
    _check(boxes, "boxes")
    boxes = _upcast(boxes)
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union `[..., N, M]` of boxes `[..., N, 4]` and others `[..., M, 4]`; NaN for 0 / 0."""
    _check(boxes, "boxes")
    _check(others, "others")
    boxes, others = _upcast(boxes)[..., :, None, :], _upcast(others)[..., None, :, :]
    low = boxes[..., :2].maximum(others[..., :2])
    overlap = (boxes[..., 2:].minimum(others[..., 2:]) - low).clamp(min=0).prod(-1)
    return overlap / (area(boxes) + area(others) - overlap)


def _upcast(boxes: Tensor) -> Tensor:
    """Half precision holds neither the area of a large box nor the difference of two."""
    return boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes


def _check(boxes: Tensor, name: str) -> None:
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise ValueError(f"{name}: expected [..., 4], got {list(boxes.shape)}")
