"""What runs on accelerators: sorts the boxes, then chooses an algorithm by the size of the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._runtime import on_device_of
from fastmask.kernels.nms.bit_matrix import launch_bit_matrix
from fastmask.kernels.nms.rank import can_rank, launch_rank
from fastmask.kernels.nms.reference import valid_mask
from fastmask.kernels.nms.scan import launch_scan
from fastmask.kernels.nms.suppression import Candidates

if TYPE_CHECKING:
    from fastmask.kernels.nms.op import NMSSpec

MAX_SINGLE_LAUNCH_OUTPUT = 256  # results up to which one launch scans; an estimate, to be measured


def launch_nms_padded(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, counts: Tensor | None, spec: NMSSpec
) -> tuple[Tensor, Tensor]:
    """Indices `[B, max_output]` and counts `[B]`, without a host-device synchronisation."""
    batch, num_boxes = scores.shape
    if not batch * num_boxes * spec.max_output:
        indices = torch.full((batch, spec.max_output), -1, dtype=torch.int64, device=boxes.device)
        return indices, torch.zeros(batch, dtype=torch.int64, device=boxes.device)

    indices = torch.empty((batch, spec.max_output), dtype=torch.int64, device=boxes.device)
    count = torch.empty(batch, dtype=torch.int64, device=boxes.device)
    boxes, classes = boxes.contiguous(), None if classes is None else classes.contiguous()
    is_scan = spec.max_output <= MAX_SINGLE_LAUNCH_OUTPUT
    with on_device_of(boxes):
        if can_rank(scores):
            scores = scores.contiguous()
            valid = valid_mask(scores, None, spec.score_threshold)
            candidates, gathered = launch_rank(boxes, scores, classes, valid, counts, not is_scan, indices)
        else:
            gathered = None
            candidates = _sorted(boxes, scores, classes, valid_mask(scores, counts, spec.score_threshold))
        if is_scan:
            launch_scan(candidates, spec.iou_threshold, indices, count)
        else:
            launch_bit_matrix(candidates, gathered, spec.iou_threshold, indices, count)
    return indices, count


def _sorted(boxes: Tensor, scores: Tensor, classes: Tensor | None, valid: Tensor | None) -> Candidates:
    num_valid = None
    if valid is not None:
        num_valid = valid.sum(1)
        # A valid score can be -inf only where `counts` alone decide what is valid, and valid boxes then have the
        # smaller indices: the stable sort keeps them first.
        scores = scores.masked_fill(~valid, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return Candidates(boxes, classes, order, num_valid)
