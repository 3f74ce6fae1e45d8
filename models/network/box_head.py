"""The box head: classes and refined boxes (§3, figure 4).

R regions, C channels, K classes, B images, N proposals and D detections of each image.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import box_ops, select_detections
from models.config import AverageBox, FCBox
from models.distributed import mean_count
from models.marks import mark
from models.network.layers import BY_INPUTS, Convs, initialise
from models.network.matching import Samples
from models.structures import PaddedDetections, PaddedTargets, Proposals


class BoxPredictions(NamedTuple):
    """Predictions for each region."""

    logits: Tensor  # [R, 1 + K], background first
    deltas: Tensor  # [R, K, 4]


class BoxTargets(NamedTuple):
    """The training target of each region."""

    labels: Tensor  # [R] int64: 1..K, 0 for the background, -1 for an empty slot
    deltas: Tensor  # [R, 4], zero for background and empty slots


class BoxHead(nn.Module):
    """Predicts the class of each region and a refined box for each class.

    Args:
        config: `FCBox` for fully connected layers over each region (figure 4, right), `AverageBox` for the average
            over it (figure 4, left).
        in_channels: of the regions.
        classes: K.
    """

    def __init__(self, config: FCBox | AverageBox, in_channels: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.resolution = config.resolution
        self.convs, self.fcs = nn.Sequential(), nn.ModuleList()
        out_channels = in_channels
        if isinstance(config, FCBox):
            self.convs = Convs(in_channels, config.conv_channels, config.convs, config.norm)
            initialise(self.convs)
            channels = config.conv_channels if config.convs else in_channels
            widths = [channels * config.resolution**2, *[config.fc_channels] * config.fcs]
            self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
            out_channels = widths[-1]
        # The predictors keep PyTorch's initialisation, as in torchvision: Fast R-CNN's 0.01 was for 4096 inputs
        self.class_logits = nn.Linear(out_channels, classes + 1)
        self.deltas = nn.Linear(out_channels, classes * 4)
        initialise(self.fcs, BY_INPUTS)

    def forward(self, regions: Tensor) -> BoxPredictions:
        """Regions `[R, C, h, w]`, with h and w of `resolution` for an `FCBox`, to class logits and box deltas."""
        if isinstance(self.config, FCBox):
            x = self.convs(regions).flatten(1)
            for fc in self.fcs:
                x = F.relu(fc(x), inplace=True)
        else:
            x = regions.mean((2, 3))
        return BoxPredictions(self.class_logits(x), self.deltas(x).unflatten(1, (-1, 4)))

    def targets(self, samples: Samples, targets: PaddedTargets) -> BoxTargets:
        """Labels and box deltas of the sampled proposals, R = B * S for S samples of each image.

        Args:
            samples: from `sample_proposals`.
            targets: ground truth.
        """
        labels, boxes = samples.labels.flatten(), samples.boxes.flatten(0, 1)
        gt_boxes = targets.boxes.take_along_dim(samples.matches[..., None], 1).flatten(0, 1)
        positive = (labels > 0)[:, None]
        # Stands for both boxes where there is no object: (0, 0, 1, 1), whose deltas are zero
        unit = (torch.arange(4, device=boxes.device) // 2).to(boxes)
        deltas = box_ops.encode(
            torch.where(positive, gt_boxes, unit), torch.where(positive, boxes, unit), self.config.delta_weights
        )
        return BoxTargets(labels, deltas)

    def loss(self, predictions: BoxPredictions, targets: BoxTargets) -> dict[str, Tensor]:
        """Losses summed over the samples and divided by `mean_count` of them (Fast R-CNN, §2.3).

        Args:
            predictions: from `forward`.
            targets: from `targets`.

        Returns:
            `loss_classifier`, the cross entropy of the class, and `loss_box_reg`, the smooth L1 distance of the deltas
            that positive samples predict for their class.
        """
        labels = targets.labels
        num_samples = mean_count((labels >= 0).sum())
        deltas = predictions.deltas.take_along_dim((labels - 1).clamp(min=0)[:, None, None], 1)[:, 0].float()
        distance = F.smooth_l1_loss(deltas, targets.deltas, beta=self.config.smooth_l1_beta, reduction="none")
        cross_entropy = F.cross_entropy(predictions.logits.float(), labels, ignore_index=-1, reduction="sum")
        return {
            "loss_classifier": cross_entropy / num_samples,
            "loss_box_reg": (distance * (labels > 0)[:, None]).sum() / num_samples,
        }

    def decode(self, predictions: BoxPredictions, proposals: Proposals, sizes: Tensor) -> PaddedDetections:
        """The highest-scoring boxes of each image over all classes, after NMS within each class.

        Args:
            predictions: from `forward`, R = B * N.
            proposals: N of each image.
            sizes: `[B, 2]`, (height, width) of the images before padding.

        Returns:
            Boxes `[B, D, 4]` in pixels of the padded images, with scores and labels, D = `config.detections`. Masks and
            heatmaps are None.
        """
        config = self.config
        with mark("selection"):
            boxes, scores, labels, counts = select_detections(
                predictions.logits,
                predictions.deltas,
                proposals.boxes,
                proposals.counts,
                sizes,
                score_threshold=config.score_threshold,
                iou_threshold=config.nms_iou,
                max_detections=config.detections,
                min_size=config.min_box_size,
                weights=config.delta_weights,
            )
        return PaddedDetections(boxes, scores, labels, counts)
