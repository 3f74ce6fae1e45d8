"""Soft non-maximum suppression: boxes that overlap a better one lose score instead of being dropped.

Repeat: the box with the highest score is selected (ties: the lower index) and keeps its score; the scores of the other
boxes of its class are multiplied by

    linear     1 - IoU  where IoU > iou_threshold, else 1
    gaussian   exp(-IoU^2 / sigma)

and boxes whose score is below `score_threshold` are dropped (Bodla et al. 2017, Soft-NMS, §3).

B segments (images), N boxes in each. A box is `(x1, y1, x2, y2)` in any one unit; IoU and area are those of `nms`. A
box whose area is not finite has an IoU of 0 with every box.

Scores only fall. Therefore a box cannot be selected while its first score is below the best current one, and its decays
may be computed later, all at once and in the same order. Of a long segment, sorted by score, only the first boxes take
part, a tile; further tiles enter when the best score in those before has fallen to theirs. One program per segment
holds the scores and boxes of the first tile in registers. It reads each of its boxes once, where PyTorch's operators
would read boxes and scores again for every selected box, in about fifteen launches. Without atomics, and deterministic:
equal to the reference bit for bit if the decay is linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import check_choice, check_float, check_fraction, check_positive
from fastmask.kernels.nms.arguments import check_boxes, check_classes, check_counts, check_max_output
from fastmask.kernels.soft_nms.op import SoftNMSSpec, soft_nms_op

METHODS = ("linear", "gaussian")


@overridable
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    *,
    method: str = "linear",
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    classes: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft non-maximum suppression in B segments at once, with results of fixed shape: it never synchronises.

    Args:
        boxes: `[B, N, 4]`, floating, `(x1, y1, x2, y2)` in any one unit.
        scores: `[B, N]`, floating. A NaN does not take part.
        iou_threshold: in [0, 1]; `"linear"` lowers the score of a box whose IoU with a selected one exceeds this.
            `"gaussian"` does not use it.
        max_output: the largest number of results per segment. B * max_output < 2^31.
        method: `"linear"` multiplies a score by 1 - IoU, `"gaussian"` by exp(-IoU^2 / sigma).
        sigma: of `"gaussian"`, positive.
        score_threshold: finite and at least 0. A box takes part as long as its score is at least this.
        classes: `[B, N]`, integer, boolean or floating; a box only changes scores of its class.
        counts: `[B]`, signed integers or uint8; the first `counts[b]` boxes of segment b, clamped to [0, N], take part.

    Returns:
        indices: `[B, max_output]` int64, of the selected boxes by falling score, ties by rising index, then -1.
        scores: `[B, max_output]`, their scores when they were selected, in the dtype of `scores`, then 0.
        Both are computed in float32, or in float64 if boxes or scores are. `"gaussian"` on an accelerator approximates
        the exponential to a few units in the last place of float32: where two scores are as close as that, their order
        may differ from the CPU's. `"linear"` gives the same bits everywhere.

    Raises:
        ValueError: a shape or device does not match, or a number is outside its range.
        TypeError: an argument has another type, or a tensor another dtype, than listed here.

    Source: Bodla et al. 2017, Soft-NMS: Improving Object Detection With One Line of Code.
    """
    check_boxes(boxes, ("B", "N"), scores)
    if classes is not None:
        check_classes(classes, boxes)
        classes = classes.detach()
    if counts is not None:
        check_counts(counts, boxes)
    score_threshold = check_float("score_threshold", score_threshold)
    if not 0 <= score_threshold < torch.inf:
        raise ValueError(f"score_threshold: expected finite and at least 0, got {score_threshold}")
    spec = SoftNMSSpec(
        iou_threshold=check_fraction("iou_threshold", iou_threshold),
        max_output=check_max_output(max_output, boxes),
        method=check_choice("method", method, METHODS),
        sigma=check_positive("sigma", sigma),
        score_threshold=score_threshold,
    )
    return soft_nms_op(boxes.detach(), scores.detach(), classes, counts, *spec)
