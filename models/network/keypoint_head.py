"""The keypoint head (§5): a heatmap for each keypoint, whose training target is one-hot.

R regions, C channels, P keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import KeypointHeadConfig
from models.distributed import mean_count
from models.marks import mark
from models.network.layers import Convs, initialise
from models.network.matching import PositiveSamples
from models.structures import Target


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

    def targets(self, samples: PositiveSamples, targets: Sequence[Target], *, size: int) -> Tensor:
        """The pixel of the heatmap in which each keypoint lies (§5).

        Args:
            samples: from `Samples.positives`, R in all images.
            targets: ground truth of each image, with keypoints.
            size: m, the pixels of a heatmap along each axis.

        Returns:
            `[R, P]` int64, row * m + column, or -1 where a keypoint is not labelled or lies outside of its region.

        Raises:
            ValueError: a target has no keypoints.
        """
        points = []
        for target, matches in zip(targets, samples.matches, strict=True):
            if target.keypoints is None:
                raise ValueError("targets: expected keypoints [G, P, 3], got None")
            points.append(target.keypoints[matches])
        keypoints, boxes = torch.cat(points), torch.cat(samples.boxes)
        low, high = boxes[:, None, :2], boxes[:, None, 2:]
        pixels = ((keypoints[..., :2] - low) * (size / (high - low))).floor()
        pixels = torch.where(keypoints[..., :2] == high, size - 1, pixels)  # the far edge belongs to the last pixel
        inside = ((pixels >= 0) & (pixels < size)).all(-1) & (keypoints[..., 2] > 0)
        return torch.where(inside, pixels[..., 1] * size + pixels[..., 0], -1.0).long()

    def loss(self, heatmaps: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The cross entropy of each keypoint's pixel, under a softmax over the m^2 pixels of its heatmap (§5).

        Args:
            heatmaps: from `forward`.
            targets: from `targets`.

        Returns:
            `loss_keypoint`, summed over the keypoints with a target and divided by `mean_count` of them.
        """
        logits = heatmaps.flatten(0, 1).flatten(1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
        return {"loss_keypoint": loss / mean_count((targets >= 0).sum())}

    @mark("heads")
    def decode(self, heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely pixel of each keypoint, after bicubic resizing of each heatmap to its box (Detectron).

        Synchronises with the device, because the sizes of the resized heatmaps depend on the boxes.

        Args:
            heatmaps: `[N, P, m, m]`, logits.
            boxes: `[N, 4]`, in pixels of the padded images.

        Returns:
            Keypoints `[N, P, 3]`, which are x and y at the centre of a pixel of the box, and 1; and their logits,
            `[N, P]`.
        """
        count, points = heatmaps.shape[:2]
        sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
        keypoints, scores = heatmaps.new_ones(count, points, 3), heatmaps.new_empty(count, points)
        for i, (width, height) in enumerate(sizes.ceil().long().tolist()):
            resized = F.interpolate(heatmaps[i, None], size=(height, width), mode="bicubic", align_corners=False)[0]
            scores[i], index = resized.flatten(1).max(1)
            pixels = torch.stack([index % width, index // width], 1)
            keypoints[i, :, :2] = boxes[i, :2] + (pixels + 0.5) * (sizes[i] / sizes[i].ceil())
        return keypoints, scores
