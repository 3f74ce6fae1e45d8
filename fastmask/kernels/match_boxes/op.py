"""The operator `fastmask::match_boxes`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import register
from fastmask.kernels.match_boxes.forward import launch_match_boxes
from fastmask.kernels.match_boxes.reference import match_boxes_reference


class MatchSpec(NamedTuple):
    """The settings of `match_boxes`, as its public function documents them."""

    high_threshold: float
    low_threshold: float
    low_quality: bool
    crowd_overlap: float


def _fake_match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    _gt_counts: Tensor,
    _counts: Tensor | None,
    _crowds: Tensor | None,
    _crowd_counts: Tensor | None,
    _spec: MatchSpec,
) -> tuple[Tensor, Tensor]:
    size = gt_boxes.shape[0], boxes.shape[-2]
    return boxes.new_empty(size, dtype=torch.int64), boxes.new_empty(size, dtype=torch.int8)


match_boxes_op = register(
    "match_boxes(Tensor boxes, Tensor gt_boxes, Tensor gt_counts, Tensor? counts, Tensor? crowds, "
    "Tensor? crowd_counts, *spec) -> (Tensor, Tensor)",
    reference=match_boxes_reference,
    launch=launch_match_boxes,
    fake=_fake_match_boxes,
    spec=MatchSpec,
)
