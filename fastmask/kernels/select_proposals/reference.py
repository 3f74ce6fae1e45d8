"""The selection of proposals in plain torch: the reference, and what runs on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._decode import decode_and_filter, result_dtype
from fastmask.kernels.nms.op import NMSSpec
from fastmask.kernels.nms.reference import nms_padded_reference

if TYPE_CHECKING:
    from fastmask.kernels.select_proposals.op import ProposalSpec


def empty_proposals(like: Tensor, batch: int, dtype: torch.dtype, spec: ProposalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """No proposals."""
    return (
        like.new_zeros(batch, spec.post_nms_top_k, 4, dtype=dtype),
        like.new_zeros(batch, spec.post_nms_top_k, dtype=dtype),
        like.new_zeros(batch, dtype=torch.int64),
    )


def select_proposals_reference(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_sizes: Tensor,
    spec: ProposalSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates of all levels as one list, levels as classes."""
    dtype = result_dtype(logits[0], deltas[0], anchors[0])
    best = [logit.topk(min(spec.pre_nms_top_k, logit.shape[1])) for logit in logits]
    scores = torch.cat([values for values, _ in best], 1).to(dtype)
    if not scores.numel():
        return empty_proposals(scores, len(scores), dtype, spec)
    chosen = zip(best, deltas, anchors, strict=True)
    parts = [(delta.take_along_dim(index[..., None], 1), anchor[index]) for (_, index), delta, anchor in chosen]
    delta, anchor = (torch.cat(tensors, 1).to(dtype) for tensors in zip(*parts, strict=True))
    boxes, takes_part = decode_and_filter(delta, anchor, image_sizes[:, None], spec)
    if spec.drop_non_finite:
        takes_part &= scores.isfinite()
    if spec.score_activation == "sigmoid":
        scores = scores.sigmoid()
    if spec.score_threshold is not None:
        takes_part &= scores >= spec.score_threshold
    levels = [torch.full((values.shape[1],), level, device=scores.device) for level, (values, _) in enumerate(best)]
    indices, counts = nms_padded_reference(
        boxes,
        scores.masked_fill(~takes_part, -torch.inf),
        torch.cat(levels).expand_as(scores),
        None,
        NMSSpec(spec.iou_threshold, -torch.inf, spec.post_nms_top_k),
    )
    empty, indices = indices < 0, indices.clamp(min=0)
    boxes = boxes.take_along_dim(indices[..., None], 1).masked_fill(empty[..., None], 0.0)
    return boxes, scores.gather(1, indices).masked_fill(empty, 0.0), counts
