"""The operator `fastmask::soft_nms`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import Size, register
from fastmask.kernels.soft_nms.forward import launch_soft_nms
from fastmask.kernels.soft_nms.reference import soft_nms_reference


class SoftNMSSpec(NamedTuple):
    """The settings of `soft_nms`, as its public function documents them."""

    iou_threshold: float
    max_output: Size
    method: str
    sigma: float
    score_threshold: float


def _fake_soft_nms(
    boxes: Tensor, scores: Tensor, _classes: Tensor | None, _counts: Tensor | None, spec: SoftNMSSpec
) -> tuple[Tensor, Tensor]:
    shape = len(boxes), spec.max_output
    return boxes.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)


soft_nms_op = register(
    "soft_nms(Tensor boxes, Tensor scores, Tensor? classes, Tensor? counts, *spec) -> (Tensor, Tensor)",
    reference=soft_nms_reference,
    launch=launch_soft_nms,
    fake=_fake_soft_nms,
    spec=SoftNMSSpec,
)
