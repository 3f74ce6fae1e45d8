"""The mask head (§3, figure 4): an independent mask for each class.

R regions, C channels, K classes, B images, D detections of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import roi_align
from models.config import FCNMask
from models.distributed import mean_count
from models.network.layers import Convs, initialise
from models.network.matching import PositiveSamples
from models.structures import Target


class MaskTargets(NamedTuple):
    """The training target of each region."""

    labels: Tensor  # [R] int64, 1..K
    masks: Tensor  # [R, m, m] in 0..1


class MaskHead(nn.Module):
    """Predicts a mask for each class: convolutions, and a transposed convolution that doubles the resolution.

    Args:
        config: resolution, convolutions.
        in_channels: of the regions.
        classes: K.
    """

    def __init__(self, config: FCNMask, in_channels: int, classes: int) -> None:
        super().__init__()
        self.resolution = config.resolution
        self.convs = Convs(in_channels, config.channels, config.convs, config.norm)
        initialise(self.convs)
        self.deconv = nn.ConvTranspose2d(config.channels if config.convs else in_channels, config.channels, 2, 2)
        self.mask_logits = nn.Conv2d(config.channels, classes, 1)
        initialise(self.deconv)
        initialise(self.mask_logits, partial(nn.init.normal_, std=config.channels**-0.5))

    def forward(self, regions: Tensor) -> Tensor:
        """Regions `[R, C, h, w]` to the logits of each class's mask, `[R, K, 2h, 2w]`."""
        return self.mask_logits(F.relu(self.deconv(self.convs(regions)), inplace=True))

    def targets(
        self, samples: PositiveSamples, targets: Sequence[Target], *, size: int, aligned: bool = True
    ) -> MaskTargets:
        """The part of each object's mask that lies in its region, resampled (§3.1).

        Args:
            samples: from `Samples.positives`, R in all images.
            targets: ground truth of each image, with masks.
            size: m, the pixels of a mask along each axis.
            aligned: whether pixel centres are at half pixels, as in the pooling of the features.

        Raises:
            ValueError: a target has no masks.
        """
        masks = []
        for boxes, matches, target in zip(samples.boxes, samples.matches, targets, strict=True):
            if target.masks is None:
                raise ValueError("targets: expected masks [G, H, W], got None")
            rois = torch.cat([matches[:, None].to(boxes), boxes], 1)  # each mask is one image of the batch
            masks.append(roi_align(target.masks[:, None].to(boxes), rois, size, aligned=aligned)[:, 0])
        return MaskTargets(samples.labels, torch.cat(masks))

    def loss(self, logits: Tensor, targets: MaskTargets) -> dict[str, Tensor]:
        """The loss of the mask that each region predicts for its class; other classes do not contribute (§3).

        Args:
            logits: from `forward`.
            targets: from `targets`.

        Returns:
            `loss_mask`, the binary cross entropy, summed over pixels and divided by `mean_count` of them.
        """
        logits = _of_class(logits, targets.labels)
        loss = F.binary_cross_entropy_with_logits(logits, targets.masks, reduction="sum")
        return {"loss_mask": loss / mean_count(torch.full((), logits.numel(), device=logits.device))}

    def decode(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Probabilities `[B, D, m, m]` of the masks of each detection's class.

        Args:
            logits: from `forward`, R = B * D.
            labels: `[B, D]` int64, 1..K; 0 in empty slots.
        """
        return _of_class(logits, labels.flatten()).sigmoid().unflatten(0, labels.shape)


def _of_class(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits `[R, m, m]` of one class for each region, float32."""
    return logits.take_along_dim((labels - 1).clamp(min=0)[:, None, None, None], 1)[:, 0].float()
