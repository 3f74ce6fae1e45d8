"""Mask R-CNN (He et al. 2017) on fastmask's operators: figure 1, as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import multiscale_roi_align
from models import preprocess as pictures
from models.config import ModelConfig
from models.network.fpn import FPN
from models.network.heads import BoxHead, KeypointHead, MaskHead, decode_keypoints, keypoint_loss, mask_loss
from models.network.layers import initialise
from models.network.matching import IGNORED, POSITIVE, match, matched_rows, sample
from models.network.resnet import ResNet, resnet_stage
from models.network.rpn import RPN
from models.structures import Detections, PaddedDetections, Target


class MaskRCNN(nn.Module):
    """Boxes, and as the config says masks, keypoints or both.

    `forward` works on a padded batch: losses for training, or inference in fixed shapes, which does not wait for the
    device. `detect` takes pictures and returns each one's detections.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.fpn is not None:
            self.backbone = ResNet(config.backbone)
            self.fpn = FPN(config.fpn, self.backbone.channels)
            self.res5 = nn.Identity()
            channels = roi_channels = config.fpn.channels
            strides = [*self.backbone.strides, 2 * self.backbone.strides[-1]]  # P6
        else:  # C4: the last stage belongs to the heads
            self.backbone = ResNet(config.backbone, stages=3)
            self.fpn = None
            self.res5 = resnet_stage(config.backbone, 4, config.box.res5_stride)
            initialise(self.res5)
            channels = self.backbone.channels[-1]
            roi_channels, strides = 2 * channels, self.backbone.strides[-1:]
        self.rpn = RPN(config.rpn, channels, strides)
        self.box_head = BoxHead(config.box, roi_channels, config.classes)
        self.mask_head = MaskHead(config.mask, roi_channels, config.classes) if config.mask else None
        self.keypoint_head = KeypointHead(config.keypoint, roi_channels) if config.keypoint else None
        self.to(memory_format=torch.channels_last)  # the layout of the fast kernels

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Target] | None = None
    ) -> PaddedDetections | dict[str, Tensor]:
        """Losses, given targets; detections in fixed shapes without.

        Args:
            images: `[B, 3, H, W]`, from `models.preprocess.batch`.
            sizes: `[B, 2]` int64, (height, width) of each image before padding.
            targets: of each image.
        """
        if targets is None:
            return self._infer(images, sizes)
        maps, *outputs = self._anchored(images)
        losses = self.rpn.losses(*outputs, targets, self.config.sampling.crowd_overlap)
        return losses | self._head_losses(maps, *self.rpn.propose(*outputs, sizes), targets)

    @torch.inference_mode()
    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections in pictures, in their own pixels. Waits once for their number, and for keypoints in each image.

        Args:
            images: uint8 RGB, `[3, H, W]` each, of any sizes.
        """
        config = self.config
        device = self.rpn.objectness.weight.device
        resized = [pictures.resize(image.to(device), config.input.min_size, config.input.max_size) for image in images]
        padded, sizes = pictures.batch(resized, config.input)
        found = self._infer(padded, sizes, compact=device.type == "cpu")
        counts = found.counts.tolist()  # waits
        detections = []
        for i, (image, small, count) in enumerate(zip(images, resized, counts, strict=True)):
            height, width = image.shape[1:]
            scale = found.boxes.new_tensor([width / small.shape[2], height / small.shape[1]])
            keypoints = scores = None
            if found.heatmaps is not None:
                keypoints, scores = decode_keypoints(found.heatmaps[i, :count], found.boxes[i, :count])
                keypoints[..., :2] *= scale
            detections.append(
                Detections(
                    boxes=found.boxes[i, :count] * scale.repeat(2),
                    scores=found.scores[i, :count],
                    labels=found.labels[i, :count],
                    image_size=(height, width),
                    mask_probabilities=None if found.masks is None else found.masks[i, :count],
                    keypoints=keypoints,
                    keypoint_scores=scores,
                    paste=config.mask.paste if config.mask else "aligned",
                )
            )
        return detections

    def _anchored(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Feature maps, and what the RPN says of the anchors of each."""
        maps = self.backbone(images)
        maps = self.fpn(maps) if self.fpn is not None else maps[-1:]
        logits, deltas = self.rpn(maps)
        return maps, logits, deltas, self.rpn.anchors(maps, images.shape[2:])

    def _infer(self, images: Tensor, sizes: Tensor, *, compact: bool = False) -> PaddedDetections:
        """Detections in a padded batch; `compact` drops slots that no image needs, which waits for their number."""
        maps, *outputs = self._anchored(images)
        proposals, counts = self.rpn.propose(*outputs, sizes)
        if compact:
            proposals = proposals[:, : int(counts.max())]
        logits, deltas = self.box_head(self._pool(maps, proposals, self.config.box.resolution))
        found = self.box_head.detect(logits, deltas, proposals, counts, sizes)
        if compact:
            found = found.first(int(found.counts.max()))
        shape = found.labels.shape
        if self.mask_head is not None:
            features = self._pool(maps, found.boxes, self.config.mask.resolution)
            found.masks = self.mask_head(features, found.labels.flatten()).sigmoid().unflatten(0, shape)
        if self.keypoint_head is not None:
            features = self._pool(maps, found.boxes, self.config.keypoint.resolution)
            found.heatmaps = self.keypoint_head(features).unflatten(0, shape)
        return found

    def _pool(self, maps: Sequence[Tensor], boxes: Tensor | Sequence[Tensor], resolution: int) -> Tensor:
        """RoIAlign of each image's boxes, and res5 over it with a C4."""
        config = self.config.pooling
        levels = self.backbone.strides if self.fpn is not None else self.backbone.strides[-1:]
        pooled = multiscale_roi_align(
            list(maps[: len(levels)]),  # P6 is for the RPN alone
            list(boxes),
            resolution,
            [1 / stride for stride in levels],
            config.sampling_ratio,
            config.aligned,
            canonical_box_size=config.canonical_box_size,
            level_rounding=config.level_rounding,
        )
        return self.res5(pooled)

    def _head_losses(
        self, maps: Sequence[Tensor], proposals: Tensor, counts: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        config = self.config
        rois, labels, matches = self._sample(proposals, counts, targets)
        matched = [matched_rows(target.boxes, index) for target, index in zip(targets, matches, strict=True)]
        logits, deltas = self.box_head(self._pool(maps, rois, config.box.resolution))
        losses = self.box_head.losses(logits, deltas, rois.flatten(0, 1), labels.flatten(), torch.cat(matched))
        if self.mask_head is None and self.keypoint_head is None:
            return losses

        positives = (labels > 0).sum(1).tolist()  # one wait: the branches of positives have no work for others
        rois = [roi[:count] for roi, count in zip(rois, positives, strict=True)]
        matches = [index[:count] for index, count in zip(matches, positives, strict=True)]
        labels = torch.cat([label[:count] for label, count in zip(labels, positives, strict=True)])
        if self.mask_head is not None:
            logits = self.mask_head(self._pool(maps, rois, config.mask.resolution), labels)
            masks = [target.masks for target in targets]
            losses["mask"] = mask_loss(logits, rois, matches, masks, config.pooling.aligned)
        if self.keypoint_head is not None:
            logits = self.keypoint_head(self._pool(maps, rois, config.keypoint.resolution))
            keypoints = [target.keypoints[index] for target, index in zip(targets, matches, strict=True)]
            losses["keypoint"] = keypoint_loss(logits, torch.cat(rois), torch.cat(keypoints))
        return losses

    @torch.no_grad()
    def _sample(self, proposals: Tensor, counts: Tensor, targets: Sequence[Target]) -> tuple[Tensor, Tensor, Tensor]:
        """Regions to learn from, `[B, S, 4]`, positives first; labels `[B, S]`, -1 without a sample; matches."""
        config = self.config.sampling
        slots = proposals.shape[1] + max(len(target.boxes) for target in targets)
        rois, labels, kinds, matches = [], [], [], []
        for proposal, count, target in zip(proposals, counts, targets, strict=True):
            roi = torch.cat([proposal, target.boxes])  # the ground truth teaches too, before the RPN finds it
            matched, kind = match(
                roi, target, config.positive_iou, config.positive_iou, crowd_overlap=config.crowd_overlap
            )
            index = torch.arange(len(roi), device=roi.device)
            kind = kind.masked_fill((index >= count) & (index < len(proposal)), IGNORED)
            label = matched_rows(target.labels, matched).masked_fill(kind != POSITIVE, 0)
            padding = slots - len(roi)
            rois.append(F.pad(roi, (0, 0, 0, padding)))
            labels.append(F.pad(label, (0, padding)))
            kinds.append(F.pad(kind, (0, padding), value=IGNORED))
            matches.append(F.pad(matched, (0, padding)))
        index, valid = sample(torch.stack(kinds), config.rois_per_image, config.positive_fraction)
        rois = torch.stack(rois).take_along_dim(index[..., None], 1)
        labels = torch.stack(labels).gather(1, index).masked_fill(~valid, -1)
        return rois, labels, torch.stack(matches).gather(1, index)
