"""The keypoint head (§5): a heatmap for each keypoint, whose training target is one-hot.

R regions, C channels, P keypoints.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import decode_keypoints, keypoint_loss
from models.config import KeypointHeadConfig
from models.distributed import mean_count
from models.marks import mark
from models.network.layers import Convs, initialise
from models.network.matching import Samples
from models.structures import PaddedTargets


class KeypointHead(nn.Module):
    """Predicts a heatmap for each keypoint, of four times the resolution of the pooling.

    Convolutions are followed by a transposed one and by bilinear upsampling, each of which doubles the resolution.

    Args:
        config: resolution, convolutions, number of keypoints.
        in_channels: of the regions.
    """

    def __init__(self, config: KeypointHeadConfig, in_channels: int) -> None:
        super().__init__()
        self.resolution = config.resolution
        self.convs = Convs(in_channels, config.channels, config.convs)
        initialise(self.convs)
        self.deconv = nn.ConvTranspose2d(config.channels, config.keypoints, 4, 2, padding=1)
        initialise(self.deconv, partial(nn.init.normal_, std=0.001))

    def forward(self, regions: Tensor) -> Tensor:
        """Regions `[R, C, h, w]` to heatmaps of logits, `[R, P, 4h, 4w]` float32."""
        x = self.deconv(self.convs(regions)).float()
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)

    def targets(self, samples: Samples, targets: PaddedTargets, *, size: int) -> Tensor:
        """The pixel of the heatmap in which each keypoint lies (§5).

        Args:
            samples: from `Samples.positives`, R in all images.
            targets: ground truth, with keypoints.
            size: m, the pixels of a heatmap along each axis.

        Returns:
            `[R, P]` int64, row * m + column, or -1 where a keypoint is not labelled or lies outside of its region, and
            for samples that are not positive.

        Raises:
            ValueError: a target has no keypoints.
        """
        if targets.keypoints is None:
            raise ValueError("targets: expected keypoints [B, G, P, 3], got None")
        keypoints = targets.keypoints.take_along_dim(samples.matches[..., None, None], 1).flatten(0, 1)
        boxes = samples.boxes.flatten(0, 1)
        low, high = boxes[:, None, :2], boxes[:, None, 2:]
        pixels = ((keypoints[..., :2] - low) * (size / (high - low))).floor()
        pixels = torch.where(keypoints[..., :2] == high, size - 1, pixels)  # the far edge belongs to the last pixel
        inside = ((pixels >= 0) & (pixels < size)).all(-1) & (keypoints[..., 2] > 0)
        inside &= (samples.labels.flatten() > 0)[:, None]
        return torch.where(inside, pixels[..., 1] * size + pixels[..., 0], -1.0).long()

    def loss(self, heatmaps: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The cross entropy of each keypoint's pixel, under a softmax over the m^2 pixels of its heatmap (§5).

        Args:
            heatmaps: from `forward`.
            targets: from `targets`.

        Returns:
            `loss_keypoint`, summed over the keypoints with a target and divided by `mean_count` of them.
        """
        return {"loss_keypoint": keypoint_loss(heatmaps, targets, reduction="sum") / mean_count((targets >= 0).sum())}

    @mark("heads")
    def decode(self, heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely pixel of each keypoint, after bicubic resizing of each heatmap to its box (Detectron).

        Args:
            heatmaps: `[N, P, m, m]`, logits.
            boxes: `[N, 4]`, in pixels of the padded images.

        Returns:
            Keypoints `[N, P, 3]`, which are x and y at the centre of a pixel of the box, and 1; and their logits,
            `[N, P]`.
        """
        return decode_keypoints(heatmaps, boxes)
