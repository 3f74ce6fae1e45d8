"""The operator `fastmask::select_proposals`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._decode import result_dtype
from fastmask.kernels._runtime import Size, register
from fastmask.kernels.select_proposals.forward import launch_select_proposals
from fastmask.kernels.select_proposals.reference import select_proposals_reference


class ProposalSpec(NamedTuple):
    """The settings of `select_proposals`, as its public function documents them; `min_size` is -inf for None."""

    pre_nms_top_k: int
    post_nms_top_k: Size
    iou_threshold: float
    score_activation: str
    score_threshold: float | None
    min_size: float
    min_size_inclusive: bool
    drop_non_finite: bool
    weights: Sequence[float]


def _fake_select_proposals(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    _image_sizes: Tensor,
    spec: ProposalSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, size, dtype = logits[0].shape[0], spec.post_nms_top_k, result_dtype(logits[0], deltas[0], anchors[0])
    return (
        logits[0].new_empty(batch, size, 4, dtype=dtype),
        logits[0].new_empty(batch, size, dtype=dtype),
        logits[0].new_empty(batch, dtype=torch.int64),
    )


select_proposals_op = register(
    "select_proposals(Tensor[] logits, Tensor[] deltas, Tensor[] anchors, Tensor image_sizes, *spec)"
    " -> (Tensor, Tensor, Tensor)",
    reference=select_proposals_reference,
    launch=launch_select_proposals,
    fake=_fake_select_proposals,
    spec=ProposalSpec,
)
