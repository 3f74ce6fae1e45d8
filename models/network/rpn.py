"""Region proposal network (Ren et al. 2015) over one feature map or the levels of a pyramid (Lin et al. 2017).

B images; A anchors at each position; S sampled anchors and P proposals of each image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import box_ops, nms_padded
from models.config import AnchorConfig, RPNConfig
from models.distributed import mean_count
from models.marks import mark
from models.network.layers import Convs, initialise
from models.network.matching import POSITIVE, index_matched, match, sample
from models.structures import Proposals, Target


class AnchorPredictions(NamedTuple):
    """Predictions for each anchor; each list has one entry for each level."""

    logits: list[Tensor]  # [B, H * W * A] float32
    deltas: list[Tensor]  # [B, H * W * A, 4] float32
    anchors: list[Tensor]  # [H * W * A, 4], pixels of the padded images


class AnchorTargets(NamedTuple):
    """The sampled anchors and their training targets."""

    indices: Tensor  # [B, S] int64, over the anchors of all levels
    valid: Tensor  # [B, S] bool: slots that hold a sample
    positive: Tensor  # [B, S] bool
    deltas: Tensor  # [B, S, 4], zero where not positive


def cell_anchors(config: AnchorConfig, levels: int) -> Tensor:
    """Anchors around the origin, `[levels, A, 4]`, ordered by size, then by aspect ratio.

    Args:
        config: sizes, aspect ratios. Each level of a pyramid has one of the sizes; a single level has all of them.
        levels: number of levels.

    Raises:
        ValueError: there are several levels and another number of sizes.
    """
    if levels > 1 and len(config.sizes) != levels:
        raise ValueError(f"anchors.sizes: expected one for each of {levels} levels, got {config.sizes}")
    sizes = torch.tensor(config.sizes).reshape(levels, -1, 1)
    ratios = torch.tensor(config.aspect_ratios).sqrt()
    half = torch.stack([sizes / ratios, sizes * ratios], -1).flatten(1, 2) / 2
    corners = torch.cat([-half, half], -1)
    return corners.round() if config.rounded else corners


class RPN(nn.Module):
    """Scores and refines the anchors at every position.

    Args:
        config: anchors, sampling, proposals.
        channels: of the feature maps.
        strides: image pixels per pixel of each feature map.
    """

    cell_anchors: Tensor

    def __init__(self, config: RPNConfig, channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.strides = strides
        self.register_buffer("cell_anchors", cell_anchors(config.anchors, len(strides)), persistent=False)
        anchors = self.cell_anchors.shape[1]
        self.convs = Convs(channels, channels, config.convs)
        self.objectness = nn.Conv2d(channels, anchors, 1)
        self.deltas = nn.Conv2d(channels, anchors * 4, 1)
        initialise(self, partial(nn.init.normal_, std=0.01))

    @mark("RPN")
    def forward(self, features: Sequence[Tensor], image_size: Sequence[int]) -> AnchorPredictions:
        """Logits and deltas of all anchors.

        Args:
            features: `[B, channels, H, W]` of each level.
            image_size: height and width of the padded images.
        """
        logits, deltas = [], []
        for x in features:
            x = self.convs(x)
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float())
        return AnchorPredictions(logits, deltas, self._anchors(features, image_size))

    @mark("RPN")
    @torch.no_grad()
    def targets(
        self, predictions: AnchorPredictions, targets: Sequence[Target], *, crowd_overlap: float
    ) -> AnchorTargets:
        """Match the anchors to the ground truth, and sample those that the losses are computed on.

        Args:
            predictions: from `forward`.
            targets: ground truth of each image.
            crowd_overlap: a negative anchor with this fraction of its area in a crowd region is ignored.
        """
        config = self.config
        anchors = torch.cat(predictions.anchors)
        all_kinds, gt_boxes = [], []
        for target in targets:
            matches, kinds = match(
                anchors,
                target,
                config.positive_iou,
                config.negative_iou,
                crowd_overlap=crowd_overlap,
                best_for_each=True,
            )
            all_kinds.append(kinds)
            gt_boxes.append(index_matched(target.boxes, matches))
        kinds = torch.stack(all_kinds)
        indices, valid = sample(kinds, config.samples_per_image, config.positive_fraction)
        positive = valid & (kinds.gather(1, indices) == POSITIVE)
        anchors = anchors[indices]
        gt_boxes = torch.stack(gt_boxes).take_along_dim(indices[..., None], 1)
        # Anchors that are not positive are their own targets, which gives deltas of zero
        deltas = box_ops.encode(torch.where(positive[..., None], gt_boxes, anchors), anchors)
        return AnchorTargets(indices, valid, positive, deltas)

    @mark("RPN")
    def loss(self, predictions: AnchorPredictions, targets: AnchorTargets) -> dict[str, Tensor]:
        """Losses summed over the sampled anchors and divided by `mean_count` of them.

        Args:
            predictions: from `forward`.
            targets: from `targets`.

        Returns:
            `loss_objectness`, the binary cross entropy of the logits, and `loss_rpn_box_reg`, the smooth L1 distance
            of the positive anchors' deltas.
        """
        num_samples = mean_count(targets.valid.sum())
        logits = torch.cat(predictions.logits, 1).gather(1, targets.indices)
        deltas = torch.cat(predictions.deltas, 1).take_along_dim(targets.indices[..., None], 1)
        objectness = F.binary_cross_entropy_with_logits(logits, targets.positive.to(logits), reduction="none")
        distance = F.smooth_l1_loss(deltas, targets.deltas, beta=self.config.smooth_l1_beta, reduction="none")
        return {
            "loss_objectness": (objectness * targets.valid).sum() / num_samples,
            "loss_rpn_box_reg": (distance * targets.positive[..., None]).sum() / num_samples,
        }

    @mark("RPN")
    @torch.no_grad()
    def decode(self, predictions: AnchorPredictions, sizes: Tensor) -> Proposals:
        """The highest-scoring boxes of each image, after NMS on each level separately.

        Args:
            predictions: from `forward`.
            sizes: `[B, 2]`, (height, width) of the images before padding.

        Returns:
            Up to `config.proposals_train` or `config.proposals` boxes of each image, depending on the mode.
        """
        config = self.config
        num_proposals = config.proposals_train if self.training else config.proposals
        scores, boxes = self._best_boxes(predictions)
        boxes = box_ops.clip(boxes, sizes[:, None, None])
        too_small = (boxes[..., 2:] - boxes[..., :2]).amin(-1) < config.min_box_size
        scores = scores.masked_fill(too_small, -math.inf)

        batch, levels, candidates = scores.shape
        with mark("NMS"):
            indices, _ = nms_padded(
                boxes.flatten(0, 1),
                scores.flatten(0, 1),
                config.nms_iou,
                min(candidates, num_proposals),
                score_threshold=-math.inf,
            )
        indices = indices.unflatten(0, (batch, levels))
        empty, indices = indices < 0, indices.clamp(min=0)
        scores = scores.gather(2, indices).masked_fill(empty, -math.inf).flatten(1)
        boxes = boxes.take_along_dim(indices[..., None], 2).flatten(1, 2)

        scores, indices = scores.topk(min(num_proposals, scores.shape[1]))
        boxes = boxes.take_along_dim(indices[..., None], 1)
        valid = scores > -math.inf
        return Proposals(boxes.masked_fill(~valid[..., None], 0.0), valid.sum(1))

    def _best_boxes(self, predictions: AnchorPredictions) -> tuple[Tensor, Tensor]:
        """The highest logits of each level, `[B, levels, n]`, and their decoded boxes, `[B, levels, n, 4]`.

        n is the largest number over the levels; other levels are padded with logits of -infinity.
        """
        top_k = self.config.pre_nms_top_k_train if self.training else self.config.pre_nms_top_k
        candidates = min(top_k, max(len(anchors) for anchors in predictions.anchors))
        all_scores, all_boxes = [], []
        for logits, deltas, anchors in zip(*predictions, strict=True):
            scores, indices = logits.topk(min(top_k, len(anchors)))
            boxes = box_ops.decode(deltas.take_along_dim(indices[..., None], 1), anchors[indices])
            padding = candidates - scores.shape[1]
            all_scores.append(F.pad(scores, (0, padding), value=-math.inf))
            all_boxes.append(F.pad(boxes, (0, 0, 0, padding)))
        return torch.stack(all_scores, 1), torch.stack(all_boxes, 1)

    def _anchors(self, features: Sequence[Tensor], image_size: Sequence[int]) -> list[Tensor]:
        """Anchors of each feature map, `[H * W * A, 4]`, ordered by row, then by column, then by cell anchor."""
        levels = []
        for feature, cell, exact_stride in zip(features, self.cell_anchors, self.strides, strict=True):
            axes = []
            for length, image_length in zip(feature.shape[2:], image_size, strict=True):
                # Rounded anchors are those of torchvision, which computes the strides from the sizes
                stride = image_length // length if self.config.anchors.rounded else exact_stride
                axes.append(torch.arange(length, device=cell.device) * stride)
            y, x = torch.meshgrid(*axes, indexing="ij")
            levels.append((torch.stack([x, y, x, y], -1)[:, :, None] + cell).flatten(0, 2))
        return levels
