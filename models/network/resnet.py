"""ResNet and ResNeXt backbones (He et al. 2016, Xie et al. 2017), with torchvision's state-dict names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.config import BackboneConfig
from models.marks import mark
from models.network.layers import BatchNorm, conv_norm, initialise

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, for depths 18 and 34."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, config: BackboneConfig) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = _norm(width, config)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = _norm(width, config)
        self.downsample = _downsample(in_channels, width, stride, config)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, width, H / stride, W / stride]`."""
        out = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        out = conv_norm(out, self.conv2, self.bn2)
        return F.relu(out.add_(_shortcut(x, self.downsample)), inplace=True)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 (grouped in a ResNeXt) and 1x1 convolutions, for depths 50 and 101."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, config: BackboneConfig) -> None:
        super().__init__()
        inner = width * config.width_per_group // 64 * config.groups
        first, second = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = _conv(in_channels, inner, 1, first)
        self.bn1 = _norm(inner, config)
        self.conv2 = _conv(inner, inner, 3, second, config.groups)
        self.bn2 = _norm(inner, config)
        self.conv3 = _conv(inner, width * self.expansion, 1)
        self.bn3 = _norm(width * self.expansion, config)
        self.downsample = _downsample(in_channels, width * self.expansion, stride, config)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, 4 * width, H / stride, W / stride]`."""
        out = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        out = F.relu(conv_norm(out, self.conv2, self.bn2), inplace=True)
        out = conv_norm(out, self.conv3, self.bn3)
        return F.relu(out.add_(_shortcut(x, self.downsample)), inplace=True)


class ResNet(nn.Module):
    """The convolutional stages, without the classifier.

    Args:
        config: depth, groups, width, batch norm, frozen stages.
        outputs: the stages whose feature maps `forward` returns, in ascending order; 1 is res2, 4 is res5. Stages
            after the last one are not built.

    Attributes:
        channels, strides: of each returned feature map.
    """

    def __init__(self, config: BackboneConfig, outputs: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__()
        self.outputs = outputs
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = _norm(64, config)
        self.stages = range(1, outputs[-1] + 1)
        for stage in self.stages:
            self.add_module(f"layer{stage}", resnet_stage(config, stage, 1 if stage == 1 else 2))
        expansion = _block(config).expansion
        self.channels = [32 * 2**stage * expansion for stage in outputs]
        self.strides = [2 * 2**stage for stage in outputs]
        initialise(self)
        self.frozen: list[nn.Module] = [self.conv1, self.bn1] if config.frozen_stages else []
        self.frozen += [self.get_submodule(f"layer{stage}") for stage in self.stages if stage < config.frozen_stages]
        for module in self.frozen:
            module.requires_grad_(False)

    @mark("backbone")
    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of `[B, 3, H, W]` images, finest first: `[B, channels[i], H / strides[i], W / strides[i]]`."""
        x = F.relu(conv_norm(images, self.conv1, self.bn1), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        features = []
        for stage in self.stages:
            x = self.get_submodule(f"layer{stage}")(x)
            if stage in self.outputs:
                features.append(x)
        return features

    def train(self, mode: bool = True) -> Self:
        """Set the mode, except of frozen stages, whose batch norms must keep their statistics."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


def resnet_stage(config: BackboneConfig, stage: int, stride: int) -> nn.Sequential:
    """One stage of a ResNet, with PyTorch's initialisation.

    Args:
        config: depth, groups, width, batch norm.
        stage: 1 (res2) to 4 (res5).
        stride: of the first block.
    """
    block = _block(config)
    width = 64 * 2 ** (stage - 1)
    in_channels = 64 if stage == 1 else width // 2 * block.expansion
    blocks = [block(in_channels, width, stride, config)]
    blocks += [block(width * block.expansion, width, 1, config) for _ in range(BLOCKS[config.depth][stage - 1] - 1)]
    return nn.Sequential(*blocks)


def _block(config: BackboneConfig) -> type[BasicBlock] | type[Bottleneck]:
    return BasicBlock if config.depth < 50 else Bottleneck


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)


def _norm(channels: int, config: BackboneConfig) -> BatchNorm:
    if config.norm == "frozen":
        return FrozenBatchNorm2d(channels, eps=config.norm_eps)
    return nn.BatchNorm2d(channels, eps=config.norm_eps)


def _downsample(in_channels: int, out_channels: int, stride: int, config: BackboneConfig) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), _norm(out_channels, config))


def _shortcut(x: Tensor, downsample: nn.Sequential | None) -> Tensor:
    if downsample is None:
        return x
    conv, norm = cast(tuple[nn.Conv2d, BatchNorm], tuple(downsample))
    return conv_norm(x, conv, norm)
