"""Greedy class-aware non-maximum suppression over many segments, with fixed-capacity output.

Boxes are visited by falling score, ties by rising index. A box is kept unless a box kept before it, of the same
class, has IoU > threshold with it:

    IoU(a, b) = |a & b| / (|a| + |b| - |a & b|),    in float32 (float64 boxes: float64), rounded as written

B segments (images, pyramid levels), N boxes in each. A box is `(x1, y1, x2, y2)` in any one unit; its area is
`(x2 - x1) * (y2 - y1)`. Classes are compared: the usual trick, which shifts the boxes of each class so that
classes cannot overlap, changes IoUs by rounding. An IoU of NaN (two boxes without area, a NaN or infinite side)
suppresses nothing.

Segments of up to 2,048 boxes are sorted by counting (`rank.py`), longer ones, and float64 scores, by `torch.sort`. The
size of the output then chooses one of two algorithms:

- Small (`scan.py`): one launch, one program per segment, which reads sorted boxes until the output is full.
- Large (`bit_matrix.py`): the sorted boxes are processed in chunks. The whole device computes a chunk's bits of "row
  suppresses column", one program per segment resolves them (`scan_bits.py`), and the boxes of later chunks are tested
  against the kept ones in parallel.

Inside a block of boxes the greedy result is the only fixed point of "a box stays unless an earlier box that stays
suppresses it". Indices are written in place: nothing is compacted, and `nms_padded` never synchronises. Deterministic,
and equal to a sequential scan bit for bit: no atomics, one writer per element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import check_float, check_fraction, check_tensor
from fastmask.kernels.nms.arguments import (
    check_boxes,
    check_classes,
    check_counts,
    check_matches_boxes,
    check_max_output,
)
from fastmask.kernels.nms.op import NMSSpec, nms_op, nms_padded_op


def _check_has_data(boxes: Tensor) -> None:
    if boxes.device.type == "meta":
        raise ValueError(
            "boxes: expected a tensor with data, which the length of the result depends on, got a meta one"
        )


@overridable
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression, as `torchvision.ops.nms`.

    On an accelerator this synchronises once, for the number of results; `nms_padded` never does.

    Args:
        boxes: `[N, 4]`, floating, `(x1, y1, x2, y2)` in any one unit; half precision is computed in float32.
        scores: `[N]`, floating. NaN counts as the highest, as in `torch.sort`.
        iou_threshold: in [0, 1]; a box is dropped if its IoU with a kept one exceeds this.

    Returns:
        int64 indices of the kept boxes by falling score, ties by rising index.

    Raises:
        ValueError: a shape or device does not match, or `iou_threshold` is outside [0, 1].
        TypeError: `boxes` or `scores` is not a dense floating tensor, or `iou_threshold` is not a number.
    """
    check_boxes(boxes, ("N",), scores)
    _check_has_data(boxes)
    return nms_op(boxes.detach(), scores.detach(), None, check_fraction("iou_threshold", iou_threshold))


@overridable
def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` where a box can only suppress boxes of its class, as `torchvision.ops.batched_nms`.

    For few boxes torchvision shifts the boxes of each class so that classes cannot overlap, which rounds their
    IoUs. This is its exact variant, for any number of boxes.

    Args:
        boxes: `[N, 4]`, floating, `(x1, y1, x2, y2)` in any one unit; half precision is computed in float32.
        scores: `[N]`, floating. NaN counts as the highest, as in `torch.sort`.
        idxs: `[N]`, the class of each box: integer, boolean or floating.
        iou_threshold: in [0, 1]; a box is dropped if its IoU with a kept one of its class exceeds this.

    Returns:
        int64 indices of the kept boxes by falling score, ties by rising index. As for torchvision, the result for
        `boxes` without elements is empty, whatever their shape and dtype.

    Raises:
        ValueError: a shape or device does not match, or `iou_threshold` is outside [0, 1].
        TypeError: `boxes` or `scores` is not a dense floating tensor, `idxs` is not a dense tensor of real
            numbers, or `iou_threshold` is not a number.
    """
    check_tensor("boxes", boxes)
    if (boxes.shape[1:] != (4,) or not boxes.is_floating_point()) and boxes.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    check_boxes(boxes, ("N",), scores)
    _check_has_data(boxes)
    check_tensor("idxs", idxs, real=True)
    check_matches_boxes("idxs", idxs, boxes, boxes.shape[:1])
    return nms_op(boxes.detach(), scores.detach(), idxs.detach(), check_fraction("iou_threshold", iou_threshold))


@overridable
def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    *,
    classes: Tensor | None = None,
    counts: Tensor | None = None,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression in B segments at once, with results of fixed shape: it never synchronises.

    Args:
        boxes: `[B, N, 4]`, floating, `(x1, y1, x2, y2)` in any one unit; half precision is computed in float32.
        scores: `[B, N]`, floating. NaN counts as the highest, but never exceeds a `score_threshold`.
        iou_threshold: in [0, 1]; a box is dropped if its IoU with a kept one exceeds this.
        max_output: the largest number of results per segment; the best are kept. B * max_output < 2^31.
        classes: `[B, N]`, integer, boolean or floating; a box can only suppress boxes of its class.
        counts: `[B]`, signed integers or uint8; the first `counts[b]` boxes of segment b, clamped to [0, N], take part.
        score_threshold: only boxes with a score above this take part.

    Returns:
        indices: `[B, max_output]` int64, of the kept boxes by falling score, ties by rising index, then -1.
        count: `[B]` int64, the number of kept boxes.

    Raises:
        ValueError: a shape or device does not match, `iou_threshold` is outside [0, 1], or `max_output` is negative
            or too large.
        TypeError: an argument has another type, or a tensor another dtype, than listed here.
    """
    check_boxes(boxes, ("B", "N"), scores)
    if classes is not None:
        check_classes(classes, boxes)
        classes = classes.detach()
    if counts is not None:
        check_counts(counts, boxes)
    spec = NMSSpec(
        iou_threshold=check_fraction("iou_threshold", iou_threshold),
        score_threshold=None if score_threshold is None else check_float("score_threshold", score_threshold),
        max_output=check_max_output(max_output, boxes),
    )
    return nms_padded_op(boxes.detach(), scores.detach(), classes, counts, *spec)
