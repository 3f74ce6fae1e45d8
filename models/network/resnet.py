"""ResNet and ResNeXt backbones (He et al. 2016, Xie et al. 2017), with torchvision's state-dict names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.config import BackboneConfig
from models.network.layers import conv_norm, initialise

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class BasicBlock(nn.Module):
    """3x3, 3x3: depths 18 and 34."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, config: BackboneConfig) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = _norm(width, config)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = _norm(width, config)
        self.downsample = _downsample(in_channels, width, stride, config)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        out = conv_norm(out, self.conv2, self.bn2)
        return F.relu(out.add_(_shortcut(x, self.downsample)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (in groups for ResNeXt), 1x1: depths 50 and 101."""

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
        out = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        out = F.relu(conv_norm(out, self.conv2, self.bn2), inplace=True)
        out = conv_norm(out, self.conv3, self.bn3)
        return F.relu(out.add_(_shortcut(x, self.downsample)), inplace=True)


class ResNet(nn.Module):
    """The convolutional stages, without the classifier.

    Args:
        config: see `BackboneConfig`.
        stages: how many of res2..res5 there are: 4 for an FPN, 3 for a C4.

    `channels` and `strides` describe the maps that `forward` returns.
    """

    def __init__(self, config: BackboneConfig, stages: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = _norm(64, config)
        self.stages = range(1, stages + 1)
        for stage in self.stages:
            self.add_module(f"layer{stage}", resnet_stage(config, stage, 1 if stage == 1 else 2))
        expansion = _block(config).expansion
        self.channels = [64 * 2**i * expansion for i in range(stages)]
        self.strides = [4 * 2**i for i in range(stages)]
        initialise(self)
        self.frozen = [self.conv1, self.bn1] if config.frozen_stages else []
        self.frozen += [self.get_submodule(f"layer{stage}") for stage in self.stages if stage < config.frozen_stages]
        for module in self.frozen:
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of `[B, 3, H, W]` images, finest first: `[B, channels[i], H / strides[i], W / strides[i]]`."""
        x = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            x = self.get_submodule(f"layer{stage}")(x)
            maps.append(x)
        return maps

    def train(self, mode: bool = True) -> ResNet:
        """Frozen stages keep their statistics as well as their weights."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


def resnet_stage(config: BackboneConfig, stage: int, stride: int) -> nn.Sequential:
    """res2 is stage 1, res5 stage 4; the first block strides."""
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


def _norm(channels: int, config: BackboneConfig) -> nn.Module:
    kind = FrozenBatchNorm2d if config.norm == "frozen" else nn.BatchNorm2d
    return kind(channels, eps=config.norm_eps)


def _downsample(in_channels: int, out_channels: int, stride: int, config: BackboneConfig) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), _norm(out_channels, config))


def _shortcut(x: Tensor, downsample: nn.Sequential | None) -> Tensor:
    return x if downsample is None else conv_norm(x, downsample[0], downsample[1])
