"""Matching of boxes to the ground truth, and their labels for the losses (He et al. 2017, §3.1, "Training").

    matches[b, n] = argmax over g < gt_counts[b] of IoU(gt_boxes[b, g], boxes[n]), the first of equal ones
    labels[b, n]  = 1 if that IoU >= high_threshold, 0 if it is < low_threshold, -1 between the two

    IoU(a, b) = |a & b| / (|a| + |b| - |a & b|), rounded as written; NaN counts as 0

B images, N boxes (anchors or proposals), G objects and C crowd regions of an image. A box is `(x1, y1, x2, y2)` in any
one unit; its area is `(x2 - x1) * (y2 - y1)`. With `low_quality`, the boxes that reach an object's highest IoU are
positive too, so that every object has one (Faster R-CNN, §3.1.2): they keep their own match, which may be another
object. A negative box that lies in a crowd region is no background, and is ignored.

Peers compute the G x N matrix of IoUs, and read it four times: 107 MB for the 268,569 anchors of an image and 100
objects. Here a *tile* of consecutive boxes is compared with the objects that touch the tile's bounding box; others have
IoU 0 with all of its boxes. Anchors are sorted by position, so that these are about 12 of 100 objects. Memory beyond
the results is one number for each tile and object: its highest IoU, from which a second launch finds the tiles that the
low-quality rule revisits. It computes the same IoUs again, to the bit.

Deterministic: no atomics. An element has one writer, except labels that the low-quality rule sets: all of their writers
store 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._runtime import compute_dtype, overridable
from fastmask.kernels._validation import (
    check_counts_dtype,
    check_flag,
    check_fraction,
    check_same_device,
    check_tensor,
)
from fastmask.kernels.match_boxes.op import MatchSpec, match_boxes_op

MAX_BOXES = 2**29  # of an image: coordinates are counted in 32 bits


def _check_boxes(name: str, boxes: Any, expected: str, *, batch: int | None, like: Tensor | None = None) -> None:
    """Boxes `[B, K, 4]`; `batch` is None where any is right."""
    check_tensor(name, boxes, floating=True)
    if boxes.ndim != 3 or boxes.shape[-1] != 4 or batch not in (None, boxes.shape[0]):
        raise ValueError(f"{name}: expected {expected}, got {list(boxes.shape)}")
    if like is not None:
        check_same_device(name, boxes, "boxes", like)


def _check_counts(name: str, counts: Any, batch: int, boxes: Tensor) -> None:
    check_counts_dtype(name, counts)
    if counts.shape != (batch,):
        raise ValueError(f"{name}: expected [{batch}], one for each image, got {list(counts.shape)}")
    check_same_device(name, counts, "boxes", boxes)


@overridable
def match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_counts: Tensor,
    high_threshold: float,
    low_threshold: float,
    *,
    low_quality: bool = False,
    counts: Tensor | None = None,
    crowds: Tensor | None = None,
    crowd_counts: Tensor | None = None,
    crowd_overlap: float = 0.7,
) -> tuple[Tensor, Tensor]:
    """Match boxes to the ground truth, and label them for the losses; it never synchronises.

    The results are those of torchvision's `box_iou` and `Matcher`, but for objects that overlap no box: torchvision's
    low-quality rule then makes every box of IoU 0 positive.

    Args:
        boxes: `[N, 4]`, shared by all images, or `[B, N, 4]`; floating, `(x1, y1, x2, y2)` in any one unit. IoUs are
            computed in float32, or in float64 if `boxes`, `gt_boxes` or `crowds` are.
        gt_boxes: `[B, G, 4]`, the objects of each image, in the unit of `boxes`. G may be 0.
        gt_counts: `[B]`, signed integers or uint8, clamped to [0, G]: how many of `gt_boxes` are objects. Values
            beyond are never used.
        high_threshold: boxes of at least this IoU with their object are positive; in [0, 1].
        low_threshold: boxes of a lower IoU are negative; in [0, `high_threshold`].
        low_quality: whether boxes with the highest IoU with an object are positive too, unless that IoU is 0.
        counts: `[B]`, as `gt_counts`: how many boxes of `boxes[b]` take part. Others have label -1. None: all.
        crowds: `[B, C, 4]`, regions of many objects.
        crowd_counts: `[B]`, as `gt_counts`: how many of `crowds` are regions. None: all.
        crowd_overlap: a negative box is ignored if at least this fraction of its area lies in one crowd region; in
            [0, 1].

    Returns:
        matches: `[B, N]` int64, the object with the highest IoU; the first one if all are 0, and 0 if there is none.
        labels: `[B, N]` int8: 1 positive, 0 negative, -1 ignored. Without objects all boxes are negative, or ignored.

    Raises:
        ValueError: shapes or devices do not match, there are more than 2^29 boxes, a threshold is not in its range,
            `counts` are given for shared boxes, or `crowd_counts` without `crowds`.
        TypeError: an argument has another type, or a tensor another dtype, than listed here.

    Source: Ren et al. 2015, Faster R-CNN, §3.1.2.
    """
    check_tensor("boxes", boxes, floating=True)
    _check_boxes("gt_boxes", gt_boxes, "[B, G, 4]", batch=None)
    batch = gt_boxes.shape[0]
    if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4 or (boxes.ndim == 3 and boxes.shape[0] != batch):
        raise ValueError(f"boxes: expected [N, 4] or [{batch}, N, 4] to match gt_boxes, got {list(boxes.shape)}")
    if boxes.shape[-2] > MAX_BOXES:
        raise ValueError(f"boxes: expected at most 2^29 of an image, got {boxes.shape[-2]}")
    check_same_device("gt_boxes", gt_boxes, "boxes", boxes)
    _check_counts("gt_counts", gt_counts, batch, boxes)
    if counts is not None:
        _check_counts("counts", counts, batch, boxes)
        if boxes.ndim == 2:
            raise ValueError("counts: expected None for boxes that all images share, got a Tensor")
    if crowds is not None:
        _check_boxes("crowds", crowds, f"[{batch}, C, 4]", batch=batch, like=boxes)
    if crowd_counts is not None:
        _check_counts("crowd_counts", crowd_counts, batch, boxes)
        if crowds is None:
            raise ValueError("crowd_counts: expected None without crowds, got a Tensor")
    spec = MatchSpec(
        high_threshold=check_fraction("high_threshold", high_threshold),
        low_threshold=check_fraction("low_threshold", low_threshold),
        low_quality=check_flag("low_quality", low_quality),
        crowd_overlap=check_fraction("crowd_overlap", crowd_overlap),
    )
    if spec.low_threshold > spec.high_threshold:
        raise ValueError(f"low_threshold: expected at most {spec.high_threshold}, got {spec.low_threshold}")
    dtype = torch.promote_types(boxes.dtype, gt_boxes.dtype)
    dtype = compute_dtype(dtype if crowds is None else torch.promote_types(dtype, crowds.dtype))
    crowds = None if crowds is None else crowds.detach().to(dtype)
    return match_boxes_op(
        boxes.detach().to(dtype), gt_boxes.detach().to(dtype), gt_counts, counts, crowds, crowd_counts, *spec
    )
