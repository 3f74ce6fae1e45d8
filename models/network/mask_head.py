"""The mask head (§3, figure 4): an independent mask for each class.

R regions, C channels, K classes, B images, D detections of each image.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fastmask import mask_loss, mask_targets, select_mask_logits
from models.config import FCNMask
from models.distributed import mean_count
from models.network.layers import Convs, initialise
from models.network.matching import Samples
from models.structures import PaddedTargets


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
        return self.mask_logits(self._upsampled(regions))

    def _upsampled(self, regions: Tensor) -> Tensor:
        return F.relu(self.deconv(self.convs(regions)), inplace=True)

    def targets(self, samples: Samples, targets: PaddedTargets, *, size: int, aligned: bool = True) -> Tensor:
        """The part of each object's mask that lies in its region, at the resolution of the predictions (§3.1).

        Args:
            samples: from `Samples.positives`, R in all images.
            targets: ground truth, with masks.
            size: m, the pixels of a mask along each axis.
            aligned: whether pixel centres of bitmaps and RLE are at half pixels, as in the pooling of the features.

        Returns:
            `[R, m, m]`, 0 or 1 for polygons, in 0..1 for bitmaps and RLE; zeros for samples that are not positive.

        Raises:
            ValueError: the targets have no masks.
        """
        if targets.masks is None:
            raise ValueError("targets: expected masks, got None")
        matches = samples.matches.masked_fill(samples.labels <= 0, -1)
        return mask_targets(targets.masks, samples.boxes, matches, size, aligned=aligned).flatten(0, 1)

    def loss(self, logits: Tensor, targets: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of the mask that each region predicts for its class; other classes do not contribute (§3).

        Args:
            logits: from `forward`.
            targets: from `targets`.
            labels: `[R]` int64, 1..K, and 0 for samples that are not positive, which do not contribute.

        Returns:
            `loss_mask`, the binary cross entropy, summed over pixels and divided by `mean_count` of them.
        """
        positive = labels > 0
        loss = mask_loss(logits, targets, labels, positive, reduction="sum")
        return {"loss_mask": loss / mean_count(positive.sum() * targets[0].numel())}

    def predict(self, regions: Tensor, labels: Tensor) -> Tensor:
        """Probabilities `[B, D, m, m]` of the masks of each detection's class, without those of other classes.

        Args:
            regions: as for `forward`, R = B * D.
            labels: `[B, D]` int64, 1..K; 0 in empty slots.
        """
        weight, bias = self.mask_logits.weight, self.mask_logits.bias
        assert bias is not None
        logits = select_mask_logits(self._upsampled(regions), weight, bias, labels.flatten())
        return logits.sigmoid().unflatten(0, labels.shape)
