"""Features of regions, and the only place in the detector that distinguishes FPN and C4.

B images, N boxes of each, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastmask import multiscale_roi_align
from models.config import C4, FPN, ModelConfig, RoIAlign
from models.marks import mark
from models.network.fpn import ResNetFPN
from models.network.layers import initialise
from models.network.resnet import ResNet, resnet_stage


class RoIFeatures(nn.Module):
    """Pools the features of each region, and applies the layers that all heads share.

    Args:
        pooling: the pooling layer.
        strides: image pixels per pixel of each feature map that regions are pooled from, finest first.
        pyramid: how boxes are assigned to the feature maps; without effect if there is only one.
        res5: layers applied to the pooled features of each region (figure 4, left); None applies none.
        channels: of the result.
    """

    def __init__(
        self,
        pooling: RoIAlign,
        strides: Sequence[int],
        *,
        channels: int,
        pyramid: FPN | None = None,
        res5: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.scales = [1 / stride for stride in strides]
        self.channels = channels
        self.pyramid = pyramid or FPN()
        self.res5 = nn.Identity() if res5 is None else res5

    def forward(self, features: Sequence[Tensor], boxes: Tensor | Sequence[Tensor], resolution: int) -> Tensor:
        """Features of the boxes of a batch.

        Args:
            features: feature maps of the backbone, finest first. Regions are pooled from the first `len(strides)`.
            boxes: `[B, N, 4]`, or `[N_b, 4]` of each image, in pixels of the padded images.
            resolution: bins along each axis.

        Returns:
            `[R, channels, h, w]`, one image after the other, R = B * N or the sum of N_b. h and w are `resolution`
            divided by the stride of `res5`.
        """
        with mark("pooling"):
            regions = multiscale_roi_align(
                list(features[: len(self.scales)]),
                list(boxes),
                resolution,
                self.scales,
                self.pooling.sampling_ratio,
                self.pooling.aligned,
                canonical_box_size=self.pyramid.canonical_box_size,
                level_rounding=self.pyramid.level_rounding,
            )
        return self.res5(regions)


def build_features(config: ModelConfig) -> tuple[ResNet | ResNetFPN, RoIFeatures]:
    """Build the backbone and the `RoIFeatures` for its feature maps, as `config.features` selects.

    Args:
        config: of the detector.

    Returns:
        The backbone, which returns the feature maps that the RPN reads and has their `channels` and `strides`; and the
        module that pools regions from them.
    """
    match config.features:
        case FPN() as pyramid:
            backbone = ResNetFPN(config.backbone, pyramid)
            levels = backbone.strides[:-1]  # P6 is for the RPN alone
            return backbone, RoIFeatures(config.pooling, levels, channels=pyramid.channels, pyramid=pyramid)
        case C4(res5_stride=stride):
            backbone = ResNet(config.backbone, outputs=(3,))
            res5 = resnet_stage(config.backbone, 4, stride)
            initialise(res5)
            channels = 2 * backbone.channels[0]
            return backbone, RoIFeatures(config.pooling, backbone.strides, channels=channels, res5=res5)
