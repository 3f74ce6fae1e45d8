"""Feature pyramid network (Lin et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import FPN, BackboneConfig
from models.marks import mark
from models.network.layers import BY_INPUTS, ConvNorm, initialise
from models.network.resnet import ResNet


class FeaturePyramid(nn.Module):
    """Adds upsampled coarse feature maps to finer ones; P6 is P5 subsampled.

    Args:
        config: channels, norm.
        in_channels: of each feature map, finest first.
    """

    def __init__(self, config: FPN, in_channels: Sequence[int]) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(ConvNorm(channels, config.channels, 1, config.norm) for channels in in_channels)
        self.output = nn.ModuleList(ConvNorm(config.channels, config.channels, 3, config.norm) for _ in in_channels)
        initialise(self, BY_INPUTS)

    @mark("FPN")
    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5, finest first, to P2..P6, `[B, config.channels, H, W]` each, where P6 has half the size of P5."""
        inner = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for i in range(len(inner) - 1, 0, -1):
            inner[i - 1] = inner[i - 1] + F.interpolate(inner[i], size=inner[i - 1].shape[-2:])
        pyramid = [output(feature) for output, feature in zip(self.output, inner, strict=True)]
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, stride=2)]


class ResNetFPN(ResNet):
    """A ResNet with a feature pyramid over its stages. `channels` and `strides` are those of P2..P6."""

    def __init__(self, config: BackboneConfig, pyramid: FPN) -> None:
        super().__init__(config)
        self.fpn = FeaturePyramid(pyramid, self.channels)
        self.strides = [*self.strides, 2 * self.strides[-1]]
        self.channels = [pyramid.channels] * len(self.strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        """P2..P6 of `[B, 3, H, W]` images, finest first: `[B, channels[i], H / strides[i], W / strides[i]]`."""
        return self.fpn(super().forward(images))
