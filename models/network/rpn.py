"""Region proposal network (Ren et al. 2015) over one feature map or the levels of a pyramid (Lin et al. 2017).

B images; A anchors at each position; S sampled anchors and P proposals of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import box_ops, match_boxes, multiscale_roi_align, sample_matches, select_proposals
from models.config import AnchorConfig, RPNConfig
from models.distributed import mean_count
from models.marks import mark
from models.network.layers import ConvNorm, Convs, initialise
from models.network.matching import POSITIVE
from models.structures import PaddedTargets, Proposals


class AnchorPredictions(NamedTuple):
    """Predictions for each anchor; each list has one entry for each level."""

    logits: list[Tensor]  # [B, H * W * A]
    deltas: list[Tensor]  # [B, H * W * A, 4]
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
    @torch.no_grad()
    def forward(self, features: Sequence[Tensor], image_size: Sequence[int]) -> AnchorPredictions:
        """Logits and deltas of all anchors, without gradients.

        Args:
            features: `[B, channels, H, W]` of each level.
            image_size: height and width of the padded images.
        """
        logits, deltas = [], []
        for x in features:
            x = self.convs(x)
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
        return AnchorPredictions(logits, deltas, self._anchors(features, image_size))

    @mark("RPN")
    @torch.no_grad()
    def targets(self, predictions: AnchorPredictions, targets: PaddedTargets, *, crowd_overlap: float) -> AnchorTargets:
        """Match the anchors to the ground truth, and sample those that the losses are computed on.

        Args:
            predictions: from `forward`.
            targets: ground truth.
            crowd_overlap: a negative anchor with this fraction of its area in a crowd region is ignored.
        """
        config = self.config
        anchors = torch.cat(predictions.anchors)
        matches, labels = match_boxes(
            anchors,
            targets.boxes,
            targets.counts,
            config.positive_iou,
            config.negative_iou,
            low_quality=True,
            crowds=targets.crowds,
            crowd_counts=targets.crowd_counts,
            crowd_overlap=crowd_overlap,
        )
        indices, valid = sample_matches(labels, config.samples_per_image, config.positive_fraction)
        positive = valid & (labels.gather(1, indices) == POSITIVE)
        anchors = anchors[indices]
        gt_boxes = targets.boxes.take_along_dim(matches.gather(1, indices)[..., None], 1)
        # Anchors that are not positive are their own targets, which gives deltas of zero
        deltas = box_ops.encode(torch.where(positive[..., None], gt_boxes, anchors), anchors)
        return AnchorTargets(indices, valid, positive, deltas)

    @mark("RPN")
    def loss(self, features: Sequence[Tensor], targets: AnchorTargets) -> dict[str, Tensor]:
        """Losses summed over the sampled anchors and divided by `mean_count` of them.

        The samples are predicted again, from their own pixels: few of all positions are sampled, and the backward of
        convolutions over whole feature maps would compute with zeros elsewhere.

        Args:
            features: as for `forward`.
            targets: from `targets`.

        Returns:
            `loss_objectness`, the binary cross entropy of the logits, and `loss_rpn_box_reg`, the smooth L1 distance
            of the positive anchors' deltas.
        """
        num_samples = mean_count(targets.valid.sum())
        logits, deltas = self._predict(features, targets.indices)
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
        with mark("selection"):
            boxes, _, counts = select_proposals(
                predictions.logits,
                predictions.deltas,
                predictions.anchors,
                sizes,
                pre_nms_top_k=config.pre_nms_top_k_train if self.training else config.pre_nms_top_k,
                post_nms_top_k=config.proposals_train if self.training else config.proposals,
                iou_threshold=config.nms_iou,
                min_size=config.min_box_size,
            )
        return Proposals(boxes, counts)

    def _predict(self, features: Sequence[Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, S]` and deltas `[B, S, 4]`, float32, of the anchors `indices [B, S]`, with gradients."""
        per_position = self.cell_anchors.shape[1]
        low, high, stride = _places(features, self.strides)[indices // per_position].split((2, 2, 1), -1)
        reach = len(self.convs)
        side = 2 * reach + 1
        # One sample in each bin, on the centre of a pixel: RoIAlign copies the pixels around each position
        centre = low + 0.5
        x = multiscale_roi_align(
            list(features),
            list(torch.cat([centre - side / 2, centre + side / 2], -1) * stride),
            side,
            [1 / stride for stride in self.strides],
            sampling_ratio=1,
            aligned=True,
            canonical_box_size=side / 1.5,  # a side of (2 * reach + 1) * 2^l is on level l, far from its bounds
            canonical_level=0,
        )
        low, high = low.flatten(0, 1), high.flatten(0, 1)
        for layer in self.convs:
            assert isinstance(layer, ConvNorm)
            offset = torch.arange(-reach, reach + 1, device=x.device)[:, None]
            inside = (offset >= -low[:, None]) & (offset <= high[:, None])  # [B * S, side, (x, y)]
            x = x * (inside[:, None, None, :, 0] & inside[:, None, :, None, 1])  # as the padding of whole maps
            x = F.relu(F.conv2d(x, layer.conv.weight, layer.conv.bias), inplace=True)
            reach -= 1
        which = (indices % per_position).flatten()[:, None]
        logits = self.objectness(x).flatten(1).gather(1, which)
        deltas = self.deltas(x).view(len(x), per_position, 4).take_along_dim(which[..., None], 1)
        return logits.float().view(indices.shape), deltas.float().view(*indices.shape, 4)

    def _anchors(self, features: Sequence[Tensor], image_size: Sequence[int]) -> list[Tensor]:
        """Anchors of each feature map, `[H * W * A, 4]`, ordered by row, then by column, then by cell anchor."""
        levels = []
        for feature, cell, exact_stride in zip(features, self.cell_anchors, self.strides, strict=True):
            axes = []
            for length, image_length in zip(feature.shape[2:], image_size, strict=True):
                # Rounded anchors are those of torchvision, which computes the strides from the sizes
                stride = image_length // length if self.config.anchors.rounded else exact_stride
                axes.append(torch.arange(0, length * stride, stride, device=cell.device))
            y, x = torch.meshgrid(*axes, indexing="ij")
            levels.append((torch.stack([x, y, x, y], -1)[:, :, None] + cell).flatten(0, 2))
        return levels


def _places(features: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """`[sum of H * W, 5]` of the positions of all levels: pixels to the left, above, to the right, below; stride."""
    levels = []
    for feature, stride in zip(features, strides, strict=True):
        height, width = feature.shape[2:]
        y, x = (torch.arange(length, device=feature.device, dtype=torch.float32) for length in (height, width))
        y, x = torch.meshgrid(y, x, indexing="ij")
        levels.append(torch.stack([x, y, width - 1 - x, height - 1 - y, torch.full_like(x, stride)], -1).flatten(0, 1))
    return torch.cat(levels)
