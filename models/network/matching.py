"""Which boxes stand for which ground truth, and which of them a loss is taken over (§3.1, Training)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import box_ops as box_ops
from models.structures import Target

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


def match(
    boxes: Tensor,
    target: Target,
    positive_iou: float,
    negative_iou: float,
    *,
    crowd_overlap: float,
    best_for_each: bool = False,
) -> tuple[Tensor, Tensor]:
    """Match boxes to the ground truth that each overlaps most.

    Args:
        boxes: `[N, 4]`.
        target: G objects, and crowds.
        positive_iou, negative_iou: positive from the one on, negative below the other, ignored in between.
        crowd_overlap: a negative is ignored if at least this part of it lies in one crowd.
        best_for_each: the boxes of each ground truth's highest IoU are positive too, however low it is, so that
            none is without (Faster R-CNN, §3.1.2).

    Returns:
        `[N]` indices into the ground truth, 0 where there is none; and `[N]` of POSITIVE, NEGATIVE, IGNORED.
    """
    if not len(target.boxes):
        matches = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        labels = torch.full_like(matches, NEGATIVE)
    else:
        iou = box_ops.iou(target.boxes, boxes).nan_to_num(0.0)
        best, matches = iou.max(0)
        labels = torch.where(best >= positive_iou, POSITIVE, torch.where(best < negative_iou, NEGATIVE, IGNORED))
        if best_for_each:
            highest = iou.amax(1, keepdim=True)
            labels = labels.masked_fill(((iou == highest) & (highest > 0)).any(0), POSITIVE)
    if len(target.crowds):
        inside = _part_inside(boxes, target.crowds).amax(1) >= crowd_overlap
        labels = labels.masked_fill(inside & (labels == NEGATIVE), IGNORED)
    return matches, labels


def sample(labels: Tensor, number: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw boxes at random, positives first, without waiting for their number.

    Args:
        labels: `[B, N]` of POSITIVE, NEGATIVE, IGNORED.
        number: boxes for each image; fewer are valid where there are not enough negatives to fill up with.
        positive_fraction: of `number`, the positives at most.

    Returns:
        Indices `[B, S]`, S = min(number, N), and which of them are valid, `[B, S]`.
    """
    slots = min(number, labels.shape[1])
    keys = torch.rand(labels.shape, device=labels.device)
    positive, chosen = keys.masked_fill(labels != POSITIVE, -1).topk(min(int(number * positive_fraction), slots))
    negative, rest = keys.masked_fill(labels != NEGATIVE, -1).topk(slots)
    positive = positive >= 0
    room = number - positive.sum(1, keepdim=True)
    negative = (negative >= 0) & (torch.arange(slots, device=labels.device) < room)
    valid = torch.cat([positive, negative], 1)
    order = valid.int().argsort(dim=1, descending=True, stable=True)[:, :slots]
    return torch.cat([chosen, rest], 1).gather(1, order), valid.gather(1, order)


def matched_rows(values: Tensor, matches: Tensor) -> Tensor:
    """`values[matches]` of a target's values, and zeros where an image has no ground truth to index."""
    return values[matches] if len(values) else values.new_zeros(len(matches), *values.shape[1:])


def _part_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """The part of each box's area that lies in each region, `[N, R]`."""
    low = boxes[:, None, :2].maximum(regions[:, :2])
    overlap = (boxes[:, None, 2:].minimum(regions[:, 2:]) - low).clamp(min=0).prod(-1)
    return overlap / box_ops.area(boxes)[:, None].clamp(min=1e-6)
