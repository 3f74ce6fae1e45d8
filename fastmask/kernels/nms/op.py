"""The operators `fastmask::nms` and `fastmask::nms_padded`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import Size, register
from fastmask.kernels.nms.forward import launch_nms_padded
from fastmask.kernels.nms.reference import nms_padded_reference, nms_reference


class NMSSpec(NamedTuple):
    """The settings of `nms_padded`, as its public function documents them."""

    iou_threshold: float
    score_threshold: float | None
    max_output: Size


def _fake_nms_padded(
    boxes: Tensor, _scores: Tensor, _classes: Tensor | None, _counts: Tensor | None, spec: NMSSpec
) -> tuple[Tensor, Tensor]:
    batch = len(boxes)
    return boxes.new_empty(batch, spec.max_output, dtype=torch.int64), boxes.new_empty(batch, dtype=torch.int64)


def _launch_nms(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    spec = NMSSpec(iou_threshold, score_threshold=None, max_output=len(boxes))
    classes = None if classes is None else classes[None]
    indices, count = launch_nms_padded(boxes[None], scores[None], classes, None, spec)
    return indices[0, : int(count)]  # the only host-device synchronisation: the result's length is data


def _fake_nms(boxes: Tensor, _scores: Tensor, _classes: Tensor | None, _iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


nms_padded_op = register(
    "nms_padded(Tensor boxes, Tensor scores, Tensor? classes, Tensor? counts, *spec) -> (Tensor, Tensor)",
    reference=nms_padded_reference,
    launch=launch_nms_padded,
    fake=_fake_nms_padded,
    spec=NMSSpec,
)
nms_op = register(
    "nms(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold) -> Tensor",
    reference=nms_reference,
    launch=_launch_nms,
    fake=_fake_nms,
)
