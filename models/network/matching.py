"""Sampling of the boxes that losses are computed on (§3.1, "Training").

B images; S samples, P proposals and G objects of each image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask import match_boxes, sample_matches
from models.config import SamplingConfig
from models.structures import PaddedTargets, Proposals

POSITIVE, IGNORED = 1, -1  # labels of `fastmask.match_boxes`


class Samples(NamedTuple):
    """The sampled proposals, on which the heads are trained; the positive ones of each image come first."""

    boxes: Tensor  # [B, S, 4]
    labels: Tensor  # [B, S] int64: 1..K, 0 for background, -1 for an empty slot
    matches: Tensor  # [B, S] int64, the object that each box is matched to

    def positives(self, slots: int) -> Samples:
        """The first `slots` samples of each image, of which those that are not positive have the label 0."""
        return Samples(self.boxes[:, :slots], self.labels[:, :slots].clamp(min=0), self.matches[:, :slots])

    def compact(self) -> Samples:
        """Without the slots after the positive samples of all images, but one. Synchronises with the device."""
        slots = max(1, int((self.labels > 0).sum(1).max()))
        return Samples(self.boxes[:, :slots], self.labels[:, :slots], self.matches[:, :slots])


@torch.no_grad()
def sample_proposals(proposals: Proposals, targets: PaddedTargets, config: SamplingConfig) -> Samples:
    """Match proposals to the ground truth, and sample those that the heads are trained on.

    The ground-truth boxes are candidates too, since the RPN may have missed them.

    Args:
        proposals: of the RPN.
        targets: ground truth.
        config: number of samples, fraction of positive ones, thresholds.
    """
    boxes = torch.cat([proposals.boxes, targets.boxes], 1)
    matches, labels = match_boxes(
        boxes,
        targets.boxes,
        targets.counts,
        config.positive_iou,
        config.positive_iou,
        crowds=targets.crowds,
        crowd_counts=targets.crowd_counts,
        crowd_overlap=config.crowd_overlap,
    )
    valid = torch.cat([_is_filled(proposals.boxes, proposals.counts), _is_filled(targets.boxes, targets.counts)], 1)
    labels = labels.masked_fill(~valid, IGNORED)
    indices, valid = sample_matches(labels, config.rois_per_image, config.positive_fraction)
    matches = matches.gather(1, indices)
    classes = targets.labels.gather(1, matches) * (labels.gather(1, indices) == POSITIVE)
    return Samples(boxes.take_along_dim(indices[..., None], 1), classes.masked_fill(~valid, -1), matches)


def _is_filled(boxes: Tensor, counts: Tensor) -> Tensor:
    """`[B, N]`: whether each slot of `boxes [B, N, 4]` holds a box."""
    return torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]
