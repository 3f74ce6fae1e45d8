"""Soft non-maximum suppression in plain torch: the reference, and what runs on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels.nms.reference import round_down_float32

if TYPE_CHECKING:
    from fastmask.kernels.soft_nms.op import SoftNMSSpec

# The first window has the best boxes of each segment, at least this many. It grows by a factor of 4 if a box beyond it
# could have been selected.
MIN_WINDOW = 1024


class Numbers(NamedTuple):
    """The settings as numbers of one dtype."""

    iou_threshold: float  # a decay needs an IoU above this
    score_threshold: float  # a box needs a score of this or more
    factor: float  # of IoU^2 in the exponent


def numbers_of(spec: SoftNMSSpec, dtype: torch.dtype) -> Numbers:
    """float32 IoUs and scores compare with these as they would with the float64 settings."""
    factor = -min(1 / spec.sigma, 1e30)  # finite: an IoU of 0 changes nothing
    if dtype == torch.float64:
        return Numbers(spec.iou_threshold, spec.score_threshold, factor)
    return Numbers(round_down_float32(spec.iou_threshold), -round_down_float32(-spec.score_threshold), factor)


def dtype_of(boxes: Tensor, scores: Tensor) -> torch.dtype:
    return compute_dtype(torch.promote_types(boxes.dtype, scores.dtype))


def first_scores_of(scores: Tensor, counts: Tensor | None, score_threshold: float) -> Tensor:
    """Scores of the boxes that take part, -inf of the others."""
    valid = scores >= score_threshold
    if counts is not None:
        valid &= torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return scores.where(valid, -torch.inf)


def soft_nms_reference(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, counts: Tensor | None, spec: SoftNMSSpec
) -> tuple[Tensor, Tensor]:
    """All segments at once, one pass over their best boxes for each selected box."""
    dtype = dtype_of(boxes, scores)
    numbers = numbers_of(spec, dtype)
    first_scores = first_scores_of(scores.to(dtype), counts, numbers.score_threshold)
    num_boxes, size = scores.shape[1], max(MIN_WINDOW, 4 * spec.max_output)
    while True:
        if size < num_boxes:
            best, index = first_scores.topk(size + 1, dim=1)
            index, beyond = index[:, :size].sort(1).values, best[:, size]
            window = first_scores.gather(1, index)
            window_boxes = boxes.gather(1, index[:, :, None].expand(-1, -1, 4)).to(dtype)
            window_classes = None if classes is None else classes.gather(1, index)
        else:
            index, beyond, window, window_boxes, window_classes = None, None, first_scores, boxes.to(dtype), classes
        place, selected = _select(window_boxes, window, window_classes, numbers, spec)
        if beyond is None or not spec.max_output or ((selected[:, -1] > beyond) | (beyond == -torch.inf)).all():
            break
        size *= 4
    if index is not None:
        place = index.gather(1, place)
    exists = selected > -torch.inf
    return place.where(exists, -1), selected.where(exists, 0).to(scores.dtype)


def _select(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, numbers: Numbers, spec: SoftNMSSpec
) -> tuple[Tensor, Tensor]:
    """Indices and scores of the selected boxes, `[B, max_output]` each; the scores of missing ones are -inf."""
    batch = len(boxes)
    indices = torch.zeros((batch, spec.max_output), dtype=torch.int64, device=boxes.device)
    selected = boxes.new_full((batch, spec.max_output), -torch.inf)
    if not boxes.numel():
        return indices, selected
    extent = boxes.mT.contiguous()
    width, height = (extent[:, 2:] - extent[:, :2]).unbind(1)
    area = width * height
    unusable = ~area.isfinite()
    area.masked_fill_(unusable, 0)
    extent.masked_fill_(unusable[:, None], 0)
    extent[:, :2].neg_()  # the minimum of two boxes is then the extent of the intersection
    nearest, union, one = torch.empty_like(extent), torch.empty_like(area), area.new_ones(())
    intersection, smallest = nearest[:, 0], torch.finfo(area.dtype).smallest_normal * torch.finfo(area.dtype).eps
    scores = scores.clone()
    for step in range(min(spec.max_output, scores.shape[1])):
        best, place = scores.max(1, keepdim=True)  # the first of equal ones
        if best.max() == -torch.inf:
            break
        indices[:, step : step + 1], selected[:, step : step + 1] = place, best
        torch.minimum(extent, extent.gather(2, place[:, None].expand(-1, 4, -1)), out=nearest)
        nearest[:, :2].add_(nearest[:, 2:]).clamp_(min=0)
        intersection.mul_(nearest[:, 1])
        torch.add(area, area.gather(1, place), out=union).sub_(intersection).clamp_(min=smallest)
        iou = intersection.div_(union)
        if classes is not None:
            iou.mul_(classes == classes.gather(1, place))
        if spec.method == "linear":
            weight = torch.sub(one, torch.threshold_(iou, numbers.iou_threshold, 0), out=iou)
        else:
            weight = iou.square_().mul_(numbers.factor).exp_()
        scores.mul_(weight)
        scores = scores.where(scores >= numbers.score_threshold, -torch.inf).scatter_(1, place, -torch.inf)
    return indices, selected
