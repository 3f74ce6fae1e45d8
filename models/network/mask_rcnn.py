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
from models.preprocess import preprocess, resized_shape
from models.structures import Detections, PaddedDetections, Target


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
        self, images: Tensor, sizes: Tensor, targets: Sequence[Target] | None = None
    ) -> PaddedDetections | dict[str, Tensor]:
        """Losses of a padded batch if targets are given, otherwise its detections.

        Args:
            images: `[B, 3, H, W]`, from `models.preprocess.batch`.
            sizes: `[B, 2]` int64, (height, width) of each image before padding.
            targets: ground truth of each image, in pixels of the padded images.

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
            masks = self.mask_head(self.roi_features(features, detections.boxes, self.mask_head.resolution))
            detections.masks = self.mask_head.decode(masks, detections.labels)
        if self.keypoint_head is not None:
            heatmaps = self.keypoint_head(self.roi_features(features, detections.boxes, self.keypoint_head.resolution))
            detections.heatmaps = heatmaps.unflatten(0, detections.labels.shape)  # decoded in `detect`
        return detections

    @mark("heads")
    def losses(self, images: Tensor, sizes: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Losses of a padded batch.

        With a mask or keypoint branch it synchronises with the device once, for the number of positive samples.

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
        losses = self.rpn.loss(anchors, anchor_targets)

        samples = sample_proposals(proposals, targets, sampling)
        boxes = self.box_head(self.roi_features(features, samples.boxes, self.box_head.resolution))
        losses |= self.box_head.loss(boxes, self.box_head.targets(samples, targets))
        if self.mask_head is None and self.keypoint_head is None:
            return losses

        positives = samples.positives()
        if self.mask_head is not None:
            masks = self.mask_head(self.roi_features(features, positives.boxes, self.mask_head.resolution))
            mask_targets = self.mask_head.targets(
                positives, targets, size=masks.shape[-1], aligned=self.config.pooling.aligned
            )
            losses |= self.mask_head.loss(masks, mask_targets)
        if self.keypoint_head is not None:
            heatmaps = self.keypoint_head(self.roi_features(features, positives.boxes, self.keypoint_head.resolution))
            keypoint_targets = self.keypoint_head.targets(positives, targets, size=heatmaps.shape[-1])
            losses |= self.keypoint_head.loss(heatmaps, keypoint_targets)
        return losses

    @torch.inference_mode()
    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections of each image, in pixels of the given image.

        Synchronises with the device once for the number of detections, and once for each image with keypoints.

        Args:
            images: uint8 RGB, `[3, H, W]` each, of any sizes and on any device.
        """
        device = self.rpn.cell_anchors.device
        batch = preprocess(images, self.config.input, device)
        detections = self.infer(*batch, compact=device.type == "cpu")
        return self._postprocess(detections, [(image.shape[1], image.shape[2]) for image in images])

    def _postprocess(self, padded: PaddedDetections, image_sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """The detections of each image, scaled from the resized images to images of (height, width)."""
        config = self.config
        detections = []
        for i, (count, (height, width)) in enumerate(zip(padded.counts.tolist(), image_sizes, strict=True)):
            resized = resized_shape(height, width, config.input.min_size, config.input.max_size)
            scale = padded.boxes.new_tensor([width / resized[1], height / resized[0]])
            boxes = padded.boxes[i, :count]
            keypoints = keypoint_scores = None
            if self.keypoint_head is not None and padded.heatmaps is not None:
                keypoints, keypoint_scores = self.keypoint_head.decode(padded.heatmaps[i, :count], boxes)
                keypoints[..., :2] *= scale
            detections.append(
                Detections(
                    boxes=boxes * scale.repeat(2),
                    scores=padded.scores[i, :count],
                    labels=padded.labels[i, :count],
                    image_size=(height, width),
                    mask_probabilities=None if padded.masks is None else padded.masks[i, :count],
                    keypoints=keypoints,
                    keypoint_scores=keypoint_scores,
                    paste=config.mask.paste if config.mask else "aligned",
                )
            )
        return detections
