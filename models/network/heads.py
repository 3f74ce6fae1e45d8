"""The branches on each region of interest (§3, figure 4), their losses, and what is read off them.

R regions, C channels, K classes, P keypoints, B images, N proposals and D detections of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import box_ops as box_ops
from fastmask import nms_padded, roi_align
from models.config import BoxHeadConfig, KeypointHeadConfig, MaskHeadConfig
from models.distributed import mean_count
from models.network.layers import BY_INPUTS, Convs, initialise
from models.structures import PaddedDetections


class BoxHead(nn.Module):
    """Which class, and where exactly: fully connected (figure 4, right), or an average over res5 (figure 4, left)."""

    def __init__(self, config: BoxHeadConfig, in_channels: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.convs = Convs(in_channels, config.conv_channels, config.convs, config.norm)
        initialise(self.convs)
        channels = config.conv_channels if config.convs else in_channels
        widths = [channels * config.resolution**2, *[config.fc_channels] * config.fcs]
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        out_channels = config.fc_channels if config.fcs else channels
        self.class_logits = nn.Linear(out_channels, classes + 1)
        self.deltas = nn.Linear(out_channels, classes * 4)
        initialise(self.fcs, BY_INPUTS)
        # What predicts keeps PyTorch's own draw, as in torchvision: Fast R-CNN's 0.01 was for 4096 inputs.

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Regions `[R, C, h, w]` to logits `[R, 1 + K]`, background first, and deltas `[R, K, 4]`; float32."""
        x = self.convs(x)
        x = x.flatten(1) if self.fcs else x.mean((2, 3))
        for fc in self.fcs:
            x = F.relu(fc(x), inplace=True)
        return self.class_logits(x).float(), self.deltas(x).unflatten(1, (-1, 4)).float()

    def losses(
        self, logits: Tensor, deltas: Tensor, rois: Tensor, labels: Tensor, matched: Tensor
    ) -> dict[str, Tensor]:
        """Mean cross entropy, and smooth L1 of the positives' own class over the number of all samples.

        Args:
            logits, deltas: from `forward`.
            rois: `[R, 4]`.
            labels: `[R]`: 1..K, 0 for background, -1 for slots without a sample.
            matched: `[R, 4]`, the ground truth of each positive.
        """
        number = mean_count((labels >= 0).sum())
        positive = (labels > 0)[:, None]
        unit = rois.new_tensor([0.0, 0.0, 1.0, 1.0])  # stands in where there is nothing to regress
        goal = box_ops.encode(
            torch.where(positive, matched, unit), torch.where(positive, rois, unit), self.config.delta_weights
        )
        own = deltas.take_along_dim((labels - 1).clamp(min=0)[:, None, None], 1)[:, 0]
        distance = F.smooth_l1_loss(own, goal, beta=self.config.smooth_l1_beta, reduction="none")
        return {
            "box_class": F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / number,
            "box": (distance * positive).sum() / number,
        }

    def detect(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, counts: Tensor, sizes: Tensor
    ) -> PaddedDetections:
        """The best boxes over all classes, after NMS within each.

        Args:
            logits, deltas: from `forward`, R = B * N.
            proposals: `[B, N, 4]`.
            counts: `[B]`, how many of each image's proposals are real.
            sizes: `[B, 2]`, (height, width) of the images before padding.
        """
        config = self.config
        batch, number = proposals.shape[:2]
        classes = deltas.shape[1]
        score = logits.softmax(1)[:, 1:].reshape(batch, number, classes)
        box = box_ops.decode(
            deltas.unflatten(0, (batch, number)), proposals[:, :, None].expand(-1, -1, classes, 4), config.delta_weights
        )
        box = box_ops.clip(box, sizes[:, None, None])
        thin = (box[..., 2:] - box[..., :2]).amin(-1) < config.min_box_size
        real = torch.arange(number, device=counts.device) < counts[:, None]
        score = score.masked_fill(thin | ~real[..., None], 0.0).flatten(1)
        box = box.flatten(1, 2)
        label = torch.arange(1, classes + 1, device=box.device).repeat(batch, number)
        detections = min(config.detections, score.shape[1])
        index, found = nms_padded(
            box, score, config.nms_iou, detections, classes=label, score_threshold=config.score_threshold
        )
        empty, index = index < 0, index.clamp(min=0)
        return PaddedDetections(
            boxes=box.take_along_dim(index[..., None], 1).masked_fill(empty[..., None], 0.0),
            scores=score.gather(1, index).masked_fill(empty, 0.0),
            labels=label.gather(1, index).masked_fill(empty, 0),
            counts=found,
        )


class MaskHead(nn.Module):
    """A mask for each class, none of which competes with another (§3)."""

    def __init__(self, config: MaskHeadConfig, in_channels: int, classes: int) -> None:
        super().__init__()
        self.convs = Convs(in_channels, config.channels, config.convs, config.norm)
        initialise(self.convs)
        self.deconv = nn.ConvTranspose2d(config.channels if config.convs else in_channels, config.channels, 2, 2)
        self.mask_logits = nn.Conv2d(config.channels, classes, 1)
        initialise(self.deconv)
        initialise(self.mask_logits, partial(nn.init.normal_, std=config.channels**-0.5))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Regions `[R, C, h, w]` to logits `[R, 2h, 2w]` of the mask of `labels[R]`, 1..K; float32."""
        x = self.convs(x)
        logits = self.mask_logits(F.relu(self.deconv(x), inplace=True))
        own = (labels - 1).clamp(min=0)[:, None, None, None]
        return logits.take_along_dim(own, 1)[:, 0].float()


def mask_loss(
    logits: Tensor, rois: Sequence[Tensor], matches: Sequence[Tensor], masks: Sequence[Tensor], aligned: bool
) -> Tensor:
    """Mean binary cross entropy of masks against the part of the ground truth in each region (§3.1).

    Args:
        logits: `[R, m, m]` of all images' regions, one image after the other.
        rois: of each image, `[R_b, 4]`.
        matches: of each image, `[R_b]`, indices into its masks.
        masks: of each image, `[G, H, W]`, 0 or 1.
        aligned: where a pixel's centre is, as in the pooling of the features.
    """
    size = logits.shape[-1]
    goals = []
    for roi, index, mask in zip(rois, matches, masks, strict=True):
        indexed = torch.cat([index[:, None].to(roi), roi], 1)
        goals.append(roi_align(mask[:, None].to(roi), indexed, size, aligned=aligned)[:, 0])
    loss = F.binary_cross_entropy_with_logits(logits, torch.cat(goals), reduction="sum")
    return loss / mean_count(torch.full((), logits.numel(), device=logits.device))


class KeypointHead(nn.Module):
    """A one-hot map for each keypoint (§5)."""

    def __init__(self, config: KeypointHeadConfig, in_channels: int) -> None:
        super().__init__()
        self.convs = Convs(in_channels, config.channels, config.convs)
        initialise(self.convs)
        self.deconv = nn.ConvTranspose2d(config.channels, config.keypoints, 4, 2, padding=1)
        initialise(self.deconv, partial(nn.init.normal_, std=0.001))

    def forward(self, x: Tensor) -> Tensor:
        """Regions `[R, C, h, w]` to logits `[R, P, 4h, 4w]`; float32."""
        x = self.convs(x)
        return F.interpolate(self.deconv(x).float(), scale_factor=2.0, mode="bilinear", align_corners=False)


def keypoint_loss(logits: Tensor, rois: Tensor, keypoints: Tensor) -> Tensor:
    """Mean cross entropy of an m^2-way softmax over the labelled keypoints that lie in their region (§5).

    Args:
        logits: `[R, P, m, m]`.
        rois: `[R, 4]`.
        keypoints: `[R, P, 3]`: x, y and visibility, of each region's ground truth.
    """
    size = logits.shape[-1]
    low, high = rois[:, None, :2], rois[:, None, 2:]
    cell = ((keypoints[..., :2] - low) * (size / (high - low))).floor()
    cell = torch.where(keypoints[..., :2] == high, size - 1, cell)  # the last pixel owns the far edge
    inside = ((cell >= 0) & (cell < size)).all(-1) & (keypoints[..., 2] > 0)
    goal = torch.where(inside, cell[..., 1] * size + cell[..., 0], -1.0).long()
    loss = F.cross_entropy(logits.flatten(0, 1).flatten(1), goal.flatten(), ignore_index=-1, reduction="sum")
    return loss / mean_count(inside.sum())


def decode_keypoints(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely pixel of each keypoint, over heat maps resized (bicubically) to their boxes (Detectron).

    Args:
        heatmaps: `[N, P, m, m]`, logits.
        boxes: `[N, 4]`, pixels.

    Returns:
        Keypoints `[N, P, 3]`: x, y (the centre of a pixel of the box), and 1; and their logits, `[N, P]`.
    """
    number, points = heatmaps.shape[:2]
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    keypoints, scores = heatmaps.new_ones(number, points, 3), heatmaps.new_empty(number, points)
    for i, (width, height) in enumerate(sizes.ceil().long().tolist()):
        resized = F.interpolate(heatmaps[i, None], size=(height, width), mode="bicubic", align_corners=False)[0]
        scores[i], index = resized.flatten(1).max(1)
        pixel = torch.stack([index % width, index // width], 1)
        keypoints[i, :, :2] = boxes[i, :2] + (pixel + 0.5) * (sizes[i] / sizes[i].ceil())
    return keypoints, scores
