"""Detections of a box head: classes scored, boxes decoded, clipped, filtered, and suppressed (Girshick 2015).

Each of an image's proposals has a score for each of K classes, by softmax over the classes and the background, and a
box for each class, or one for all. A pair of a proposal and a class whose score exceeds the threshold is a candidate.
Its box is decoded (`_decode.py`), limited to the image, and dropped where it is too small. Greedy NMS follows within
each class, and the `max_detections` best of all classes are the detections of the image (He et al. 2017, §3.1).

B images, N proposals of each, K classes, D detections of each image. Boxes are `(x1, y1, x2, y2)` in pixels of the
images, continuous. Order: by falling score; ties by rising proposal, then by rising class.

A softmax gives no more than 1 / threshold classes a score above a threshold, 20 of 80 for 0.05. That is how many slots
each proposal has for its candidates. Deltas are read, and boxes decoded, of candidates only: about 0.6 MB of device
memory is read and written for 1000 proposals, where decoding all boxes of all classes takes 45. Candidates are then
listed without gaps and sorted (`order.py`), suppressed by the one launch of `nms_padded` that stops at D boxes, and
gathered: five launches, and no host-device synchronisation. Deterministic: no atomics, one writer per element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastmask.kernels._decode import check_decode_options, check_image_sizes
from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import (
    MAX_INT32,
    check_choice,
    check_counts_dtype,
    check_float,
    check_fraction,
    check_int,
    check_same_device,
    check_tensor,
)
from fastmask.kernels.select_detections.op import DetectionSpec, select_detections_op

BACKGROUNDS = ("first", "last")
ACTIVATIONS = ("softmax", "sigmoid")
MAX_PROPOSALS = 2**30  # of all images: counted in 32 bits


def _check_predictions(class_logits: Tensor, deltas: Tensor, proposals: Tensor) -> Tensor:
    """Returns the deltas as `[R, 1 | K | 1 + K, 4]`."""
    for name, tensor in (("class_logits", class_logits), ("deltas", deltas), ("proposals", proposals)):
        check_tensor(name, tensor, floating=True)
        check_same_device(name, tensor, "class_logits", class_logits)
    if proposals.ndim != 3 or proposals.shape[2] != 4:
        raise ValueError(f"proposals: expected [B, N, 4], got {list(proposals.shape)}")
    rows = proposals.shape[0] * proposals.shape[1]
    if class_logits.ndim != 2 or class_logits.shape[0] != rows or class_logits.shape[1] < 1:
        raise ValueError(f"class_logits: expected [{rows}, 1 + K] to match proposals, got {list(class_logits.shape)}")
    if rows > MAX_PROPOSALS:
        raise ValueError(f"proposals: expected at most 2^30 of all images, got {rows}")
    columns = class_logits.shape[1]
    agnostic = deltas[:, None] if deltas.ndim == 2 else deltas
    if agnostic.ndim != 3 or agnostic.shape[0] != rows or agnostic.shape[2] != 4:
        expected = f"[{rows}, 4] or [{rows}, boxes, 4] to match proposals"
        raise ValueError(f"deltas: expected {expected}, got {list(deltas.shape)}")
    if agnostic.shape[1] not in (1, columns - 1, columns):
        expected = f"1, {columns - 1} or {columns} boxes for {columns} columns of class_logits"
        raise ValueError(f"deltas: expected {expected}, got {list(deltas.shape)}")
    return agnostic


@overridable
def select_detections(
    class_logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    counts: Tensor,
    image_sizes: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    min_size: float | None = None,
    min_size_inclusive: bool = True,
    weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    score_activation: str = "softmax",
    background: str = "first",
    drop_non_finite: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The detections of a batch from a box head's outputs, in fixed shapes and without synchronisation.

    torchvision's `RoIHeads.postprocess_detections` is `min_size=1e-2`. detectron2's `fast_rcnn_inference` is
    `background="last", drop_non_finite=True`.

    Args:
        class_logits: `[B * N, 1 + K]`, floating.
        deltas: floating, `(dx, dy, dw, dh)` as `fastmask.box_ops.decode` takes them: `[B * N, K, 4]` for each class;
            `[B * N, 1 + K, 4]` also for the background, which is ignored; or `[B * N, 4]`, one box for all classes.
        proposals: `[B, N, 4]`, floating, `(x1, y1, x2, y2)` in pixels of the images.
        counts: `[B]`, signed integers or uint8; the first `counts[b]` proposals of image b, clamped to [0, N], take
            part.
        image_sizes: `[B, 2]`, (height, width) of the images in pixels; boxes are limited to them.
        score_threshold: only classes with a score above this take part.
        iou_threshold: in [0, 1]; a box is dropped if its IoU with a better one of its class exceeds this.
        max_detections: D, the largest number of detections of an image. B * D < 2^31.
        min_size: in pixels; a box whose width or height is smaller, after clipping, is dropped. None drops only boxes
            with a NaN coordinate, which are dropped in any case.
        min_size_inclusive: whether a side of exactly `min_size` is enough.
        weights: factors of dx, dy, dw and dh, as given to `fastmask.box_ops.encode`.
        score_activation: `"softmax"` over all columns of `class_logits`, or `"sigmoid"` of each.
        background: whether the background is the `"first"` or the `"last"` column of `class_logits`.
        drop_non_finite: whether a proposal is dropped if a score of any column, or a coordinate of any of its boxes
            before clipping, is not finite. All boxes are then decoded.

    Returns:
        boxes: `[B, D, 4]`, by falling score, then zeros.
        scores: `[B, D]`, zeros after the detections.
        labels: `[B, D]` int64, columns of `class_logits`: 1..K if the background is first, 0..K - 1 if it is last;
            zeros after the detections.
        counts: `[B]` int64, the number of detections.

        Boxes and scores are float32, or float64 where an input is; they have no gradient. Ties are ordered by rising
        proposal, then by rising class.

    Raises:
        ValueError: shapes or devices do not match, or a number is outside its range.
        TypeError: an argument has another type, or a tensor another dtype, than listed here.

    Source: Girshick 2015, Fast R-CNN, §2; He et al. 2017, Mask R-CNN, §3.1.
    """
    deltas = _check_predictions(class_logits, deltas, proposals)
    batch = proposals.shape[0]
    check_counts_dtype("counts", counts)
    if counts.shape != (batch,):
        raise ValueError(f"counts: expected [{batch}], got {list(counts.shape)}")
    check_tensor("image_sizes", image_sizes, real=True)
    check_image_sizes(image_sizes, batch)
    check_same_device("counts", counts, "class_logits", class_logits)
    check_same_device("image_sizes", image_sizes, "class_logits", class_logits)
    size = check_int("max_detections", max_detections, least=0)
    if batch * size > MAX_INT32:
        raise ValueError(f"max_detections: expected fewer than 2^31 detections of {batch} images, got {size}")
    threshold = check_float("score_threshold", score_threshold)
    if not threshold <= math.inf:
        raise ValueError(f"score_threshold: expected a number, got {threshold}")
    spec = DetectionSpec(
        score_threshold=threshold,
        iou_threshold=check_fraction("iou_threshold", iou_threshold),
        max_detections=size,
        score_activation=check_choice("score_activation", score_activation, ACTIVATIONS),
        background=check_choice("background", background, BACKGROUNDS),
        **check_decode_options(weights, min_size, min_size_inclusive, drop_non_finite),
    )
    tensors = (class_logits.detach(), deltas.detach(), proposals.detach(), counts, image_sizes.detach())
    return select_detections_op(*tensors, *spec)
