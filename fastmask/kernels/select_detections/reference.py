"""The selection of detections in plain torch: the reference, and what runs on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask import box_ops
from fastmask.kernels._decode import decode_and_filter, result_dtype
from fastmask.kernels.nms.op import NMSSpec
from fastmask.kernels.nms.reference import nms_padded_reference

if TYPE_CHECKING:
    from fastmask.kernels.select_detections.op import DetectionSpec


def first_class(spec: DetectionSpec) -> int:
    """The column of the first class."""
    return int(spec.background == "first")


def empty_detections(
    like: Tensor, batch: int, dtype: torch.dtype, spec: DetectionSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """No detections."""
    return (
        like.new_zeros(batch, spec.max_detections, 4, dtype=dtype),
        like.new_zeros(batch, spec.max_detections, dtype=dtype),
        like.new_zeros(batch, spec.max_detections, dtype=torch.int64),
        like.new_zeros(batch, dtype=torch.int64),
    )


def select_detections_reference(
    class_logits: Tensor, deltas: Tensor, proposals: Tensor, counts: Tensor, image_sizes: Tensor, spec: DetectionSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists the candidates, then decodes those."""
    (batch, num_proposals), columns = proposals.shape[:2], class_logits.shape[1]
    dtype, device = result_dtype(class_logits, deltas, proposals), proposals.device
    first = first_class(spec)
    class_logits = class_logits.to(dtype)
    scores = class_logits.softmax(1) if spec.score_activation == "softmax" else class_logits.sigmoid()
    valid = torch.arange(num_proposals, device=device) < counts[:, None]
    is_class = torch.ones(columns, dtype=torch.bool, device=device)
    is_class[0 if first else -1] = False
    passes = (scores > spec.score_threshold) & valid.flatten()[:, None] & is_class
    if spec.drop_non_finite:
        anchors = proposals.flatten(0, 1)[:, None].to(dtype).expand(-1, deltas.shape[1], 4)
        finite = box_ops.decode(deltas.to(dtype), anchors, spec.weights).isfinite().flatten(1).all(1)
        passes &= (finite & scores.isfinite().all(1))[:, None]
    row, column = passes.nonzero(as_tuple=True)
    image = row // max(num_proposals, 1)
    delta = deltas[row, 0 if deltas.shape[1] == 1 else column - (first if deltas.shape[1] < columns else 0)]
    anchor = proposals.flatten(0, 1)[row]
    boxes, large = decode_and_filter(delta.to(dtype), anchor.to(dtype), image_sizes[image], spec)
    (kept,) = large.nonzero(as_tuple=True)
    image, column, boxes, scores = image[kept], column[kept], boxes[kept], scores[row[kept], column[kept]]

    number = image.bincount(minlength=batch)
    size = int(number.max()) if len(kept) else 0
    if not size:
        return empty_detections(proposals, batch, dtype, spec)
    place = torch.arange(len(kept), device=device) - (number.cumsum(0) - number)[image]
    padded_boxes, padded_scores = boxes.new_zeros(batch, size, 4), boxes.new_zeros(batch, size)
    padded_labels = column.new_zeros(batch, size)
    padded_boxes[image, place], padded_scores[image, place], padded_labels[image, place] = boxes, scores, column
    indices, counts = nms_padded_reference(
        padded_boxes, padded_scores, padded_labels, number, NMSSpec(spec.iou_threshold, None, spec.max_detections)
    )
    empty, indices = indices < 0, indices.clamp(min=0)
    return (
        padded_boxes.take_along_dim(indices[..., None], 1).masked_fill(empty[..., None], 0.0),
        padded_scores.gather(1, indices).masked_fill(empty, 0.0),
        padded_labels.gather(1, indices).masked_fill(empty, 0),
        counts,
    )
