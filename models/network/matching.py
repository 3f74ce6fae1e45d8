"""Matching of boxes to the ground truth, and sampling of the boxes that losses are computed on (§3.1, "Training").

B images; N boxes, S samples and G objects of each image; R positive samples in all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import box_ops
from models.config import SamplingConfig
from models.structures import Proposals, Target

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


class PositiveSamples(NamedTuple):
    """The positive samples, on which the mask and keypoint heads are trained; R_b in image b."""

    boxes: list[Tensor]  # [R_b, 4]
    labels: Tensor  # [R] int64, 1..K, one image after the other
    matches: list[Tensor]  # [R_b] int64, the object that each box is matched to


class Samples(NamedTuple):
    """The sampled proposals, on which the heads are trained; the positive ones of each image come first."""

    boxes: Tensor  # [B, S, 4]
    labels: Tensor  # [B, S] int64: 1..K, 0 for background, -1 for an empty slot
    matches: Tensor  # [B, S] int64, the object that each box is matched to

    def positives(self) -> PositiveSamples:
        """The positive samples. Synchronises with the device."""
        counts = (self.labels > 0).sum(1).tolist()
        return PositiveSamples(
            [boxes[:count] for boxes, count in zip(self.boxes, counts, strict=True)],
            torch.cat([labels[:count] for labels, count in zip(self.labels, counts, strict=True)]),
            [matches[:count] for matches, count in zip(self.matches, counts, strict=True)],
        )


@torch.no_grad()
def sample_proposals(proposals: Proposals, targets: Sequence[Target], config: SamplingConfig) -> Samples:
    """Match proposals to the ground truth, and sample those that the heads are trained on.

    The ground-truth boxes are candidates too, since the RPN may have missed them.

    Args:
        proposals: of the RPN.
        targets: ground truth of each image.
        config: number of samples, fraction of positive ones, thresholds.
    """
    slots = proposals.boxes.shape[1] + max(len(target.boxes) for target in targets)
    all_boxes, all_labels, all_kinds, all_matches = [], [], [], []
    for image_boxes, count, target in zip(*proposals, targets, strict=True):
        boxes = torch.cat([image_boxes, target.boxes])
        matches, kinds = match(
            boxes, target, config.positive_iou, config.positive_iou, crowd_overlap=config.crowd_overlap
        )
        index = torch.arange(len(boxes), device=boxes.device)
        kinds = kinds.masked_fill((index >= count) & (index < len(image_boxes)), IGNORED)  # empty slots
        labels = index_matched(target.labels, matches).masked_fill(kinds != POSITIVE, 0)
        padding = slots - len(boxes)
        all_boxes.append(F.pad(boxes, (0, 0, 0, padding)))
        all_labels.append(F.pad(labels, (0, padding)))
        all_kinds.append(F.pad(kinds, (0, padding), value=IGNORED))
        all_matches.append(F.pad(matches, (0, padding)))
    indices, valid = sample(torch.stack(all_kinds), config.rois_per_image, config.positive_fraction)
    return Samples(
        boxes=torch.stack(all_boxes).take_along_dim(indices[..., None], 1),
        labels=torch.stack(all_labels).gather(1, indices).masked_fill(~valid, -1),
        matches=torch.stack(all_matches).gather(1, indices),
    )


def match(
    boxes: Tensor,
    target: Target,
    positive_iou: float,
    negative_iou: float,
    *,
    crowd_overlap: float,
    best_for_each: bool = False,
) -> tuple[Tensor, Tensor]:
    """Match each box to the object that it overlaps most.

    Args:
        boxes: `[N, 4]`.
        target: G objects, and crowd regions.
        positive_iou: boxes of at least this IoU with their object are positive.
        negative_iou: boxes of a lower IoU are negative; boxes between the two thresholds are ignored.
        crowd_overlap: a negative box is ignored if at least this fraction of its area lies in one crowd region.
        best_for_each: whether the boxes with the highest IoU with each object are positive too, so that every object
            has one, unless that IoU is 0 (Faster R-CNN, §3.1.2).

    Returns:
        The index of each box's object, `[N]` int64, 0 if there are no objects; and the kind of each box, `[N]` int64
        of POSITIVE, NEGATIVE and IGNORED.
    """
    if not len(target.boxes):
        matches = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        kinds = torch.full_like(matches, NEGATIVE)
    else:
        iou = box_ops.iou(target.boxes, boxes).nan_to_num(0.0)
        best, matches = iou.max(0)
        kinds = torch.where(best >= positive_iou, POSITIVE, torch.where(best < negative_iou, NEGATIVE, IGNORED))
        if best_for_each:
            highest = iou.amax(1, keepdim=True)
            kinds = kinds.masked_fill(((iou == highest) & (highest > 0)).any(0), POSITIVE)
    if len(target.crowds):
        in_crowd = _overlap_fraction(boxes, target.crowds).amax(1) >= crowd_overlap
        kinds = kinds.masked_fill(in_crowd & (kinds == NEGATIVE), IGNORED)
    return matches, kinds


def sample(kinds: Tensor, num_samples: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Sample boxes of each image at random, without host-device synchronisation. Positive ones come first.

    Args:
        kinds: `[B, N]` of POSITIVE, NEGATIVE and IGNORED.
        num_samples: boxes to sample in each image; fewer are sampled if there are not enough negative boxes.
        positive_fraction: the largest fraction of `num_samples` that is positive.

    Returns:
        Indices `[B, S]`, S = min(num_samples, N), and which of them are samples, `[B, S]` bool.
    """
    slots = min(num_samples, kinds.shape[1])
    keys = torch.rand(kinds.shape, device=kinds.device)
    max_positives = min(int(num_samples * positive_fraction), slots)
    positive_keys, positives = keys.masked_fill(kinds != POSITIVE, -1).topk(max_positives)
    negative_keys, negatives = keys.masked_fill(kinds != NEGATIVE, -1).topk(slots)
    is_positive = positive_keys >= 0
    max_negatives = num_samples - is_positive.sum(1, keepdim=True)
    is_negative = (negative_keys >= 0) & (torch.arange(slots, device=kinds.device) < max_negatives)
    valid = torch.cat([is_positive, is_negative], 1)
    order = valid.int().argsort(dim=1, descending=True, stable=True)[:, :slots]
    return torch.cat([positives, negatives], 1).gather(1, order), valid.gather(1, order)


def index_matched(values: Tensor, matches: Tensor) -> Tensor:
    """Index values of the objects of one image; an image without objects gives zeros.

    Args:
        values: `[G, ...]`.
        matches: `[N]` int64, from `match`.

    Returns:
        `values[matches]`, `[N, ...]`.
    """
    return values[matches] if len(values) else values.new_zeros(len(matches), *values.shape[1:])


def _overlap_fraction(boxes: Tensor, regions: Tensor) -> Tensor:
    """The fraction of each box's area that lies in each region, `[N, regions]`."""
    low = boxes[:, None, :2].maximum(regions[:, :2])
    overlap = (boxes[:, None, 2:].minimum(regions[:, 2:]) - low).clamp(min=0).prod(-1)
    return overlap / box_ops.area(boxes)[:, None].clamp(min=1e-6)
