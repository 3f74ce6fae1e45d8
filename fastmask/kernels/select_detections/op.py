"""The operator `fastmask::select_detections`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._decode import result_dtype
from fastmask.kernels._runtime import Size, register
from fastmask.kernels.select_detections.forward import launch_select_detections
from fastmask.kernels.select_detections.reference import select_detections_reference


class DetectionSpec(NamedTuple):
    """The settings of `select_detections`, as its public function documents them; `min_size` is -inf for None."""

    score_threshold: float
    iou_threshold: float
    max_detections: Size
    score_activation: str
    background: str
    min_size: float
    min_size_inclusive: bool
    drop_non_finite: bool
    weights: Sequence[float]


def _fake_select_detections(
    class_logits: Tensor, deltas: Tensor, proposals: Tensor, _counts: Tensor, _image_sizes: Tensor, spec: DetectionSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, size, dtype = proposals.shape[0], spec.max_detections, result_dtype(class_logits, deltas, proposals)
    return (
        proposals.new_empty(batch, size, 4, dtype=dtype),
        proposals.new_empty(batch, size, dtype=dtype),
        proposals.new_empty(batch, size, dtype=torch.int64),
        proposals.new_empty(batch, dtype=torch.int64),
    )


select_detections_op = register(
    "select_detections(Tensor class_logits, Tensor deltas, Tensor proposals, Tensor counts, Tensor image_sizes, *spec)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=select_detections_reference,
    launch=launch_select_detections,
    fake=_fake_select_detections,
    spec=DetectionSpec,
)
