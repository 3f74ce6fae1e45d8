"""Mask R-CNN (He et al. 2017) on fastmask's operators: figure 1 as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.marks import mark
from models.network.box_head import BoxHead
from models.network.keypoint_head import KeypointHead
from models.network.mask_head import MaskHead
from models.network.matching import sample_proposals
from models.network.roi_features import build_features
from models.network.rpn import RPN
from models.preprocess import preprocess
from models.structures import Detections, PaddedDetections, PaddedTargets


class MaskRCNN(nn.Module):
    """Detects boxes and, depending on the config, masks and keypoints.

    `forward` takes a padded batch. It returns the losses if targets are given, and otherwise detections in fixed
    shapes, without host-device synchronisation. `detect` takes images and returns the detections of each.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, self.roi_features = build_features(config)
        self.rpn = RPN(config.rpn, self.backbone.channels[0], self.backbone.strides)
        channels = self.roi_features.channels
        self.box_head = BoxHead(config.box, channels, config.classes)
        self.mask_head = MaskHead(config.mask, channels, config.classes) if config.mask else None
        self.keypoint_head = KeypointHead(config.keypoint, channels) if config.keypoint else None
        # The layout of the fast kernels. PyTorch's overloads of Module.to leave this argument out.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(
        self, images: Tensor, sizes: Tensor, targets: PaddedTargets | None = None
    ) -> PaddedDetections | dict[str, Tensor]:
        """Losses of a padded batch if targets are given, otherwise its detections.

        Args:
            images: `[B, 3, H, W]`, from `models.preprocess.batch`.
            sizes: `[B, 2]` int64, (height, width) of each image before padding.
            targets: ground truth, from `models.structures.pad_targets`.

        Returns:
            From `losses` or from `infer`.
        """
        return self.infer(images, sizes) if targets is None else self.losses(images, sizes, targets)

    @mark("heads")  # the other stages have marks of their own
    def infer(self, images: Tensor, sizes: Tensor, *, compact: bool = False) -> PaddedDetections:
        """Detections of a padded batch in fixed shapes.

        Args:
            images, sizes: as for `forward`.
            compact: drop slots that no image fills, which saves work but synchronises with the device twice.

        Returns:
            Up to `config.box.detections` of each image, in pixels of the padded images.
        """
        features = self.backbone(images)
        anchors = self.rpn(features, images.shape[2:])
        proposals = self.rpn.decode(anchors, sizes)
        proposals = proposals.compact() if compact else proposals

        boxes = self.box_head(self.roi_features(features, proposals.boxes, self.box_head.resolution))
        detections = self.box_head.decode(boxes, proposals, sizes)
        detections = detections.compact() if compact else detections

        if self.mask_head is not None:
            regions = self.roi_features(features, detections.boxes, self.mask_head.resolution)
            detections.masks = self.mask_head.predict(regions, detections.labels)
        if self.keypoint_head is not None:
            heatmaps = self.keypoint_head(self.roi_features(features, detections.boxes, self.keypoint_head.resolution))
            keypoints, scores = self.keypoint_head.decode(heatmaps, detections.boxes.flatten(0, 1))
            detections.keypoints = keypoints.unflatten(0, detections.labels.shape)
            detections.keypoint_scores = scores.unflatten(0, detections.labels.shape)
        return detections

    @mark("heads")
    def losses(self, images: Tensor, sizes: Tensor, targets: PaddedTargets) -> dict[str, Tensor]:
        """Losses of a padded batch, without host-device synchronisation.

        The mask and keypoint heads have a slot for each positive sample that there may be; losses ignore empty slots.

        Args:
            images, sizes, targets: as for `forward`.

        Returns:
            Scalars under torchvision's names: `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`,
            `loss_box_reg` and, with these branches, `loss_mask` and `loss_keypoint`.
        """
        sampling = self.config.sampling
        features = self.backbone(images)
        anchors = self.rpn(features, images.shape[2:])
        proposals = self.rpn.decode(anchors, sizes)
        anchor_targets = self.rpn.targets(anchors, targets, crowd_overlap=sampling.crowd_overlap)
        losses = self.rpn.loss(features, anchor_targets)

        samples = sample_proposals(proposals, targets, sampling)
        boxes = self.box_head(self.roi_features(features, samples.boxes, self.box_head.resolution))
        losses |= self.box_head.loss(boxes, self.box_head.targets(samples, targets))
        if self.mask_head is None and self.keypoint_head is None:
            return losses

        positives = samples.positives(int(sampling.rois_per_image * sampling.positive_fraction))
        positives = positives.compact() if images.device.type == "cpu" else positives  # fewer regions to compute
        if self.mask_head is not None:
            masks = self.mask_head(self.roi_features(features, positives.boxes, self.mask_head.resolution))
            mask_targets = self.mask_head.targets(
                positives, targets, size=masks.shape[-1], aligned=self.config.pooling.aligned
            )
            losses |= self.mask_head.loss(masks, mask_targets, positives.labels.flatten())
        if self.keypoint_head is not None:
            heatmaps = self.keypoint_head(self.roi_features(features, positives.boxes, self.keypoint_head.resolution))
            keypoint_targets = self.keypoint_head.targets(positives, targets, size=heatmaps.shape[-1])
            losses |= self.keypoint_head.loss(heatmaps, keypoint_targets)
        return losses

    @torch.inference_mode()
    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections of each image, in pixels of the given image.

        Synchronises with the device once, for the number of detections.

        Args:
            images: uint8 RGB, `[3, H, W]` each, of any sizes and on any device.
        """
        paste = self.config.mask.paste if self.config.mask else "aligned"
        return self.detect_padded(images).split([(image.shape[1], image.shape[2]) for image in images], paste)

    @torch.inference_mode()
    def detect_padded(self, images: Sequence[Tensor]) -> PaddedDetections:
        """Detections in fixed shapes, in pixels of the given images, without host-device synchronisation.

        Args:
            images: as for `detect`.
        """
        device = self.rpn.cell_anchors.device
        batch, shapes = preprocess(images, self.config.input, device)
        detections = self.infer(*batch, compact=device.type == "cpu")
        detections.rescale(
            [(image.shape[1] / h, image.shape[2] / w) for image, (h, w) in zip(images, shapes, strict=True)]
        )
        return detections
