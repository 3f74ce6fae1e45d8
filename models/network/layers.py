"""Convolution with normalisation, and the initialisation of layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.config import Norm

BatchNorm = nn.BatchNorm2d | FrozenBatchNorm2d


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: BatchNorm | nn.Identity) -> Tensor:
    """`norm(conv(x))`. Constant statistics are folded into the weights, which saves a pass over the activations."""
    if isinstance(norm, nn.Identity):
        return conv(x)
    if norm.training and not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    constants: Any = norm  # both kinds have the same tensors, which only one of them declares
    scale = constants.weight * (constants.running_var + constants.eps).rsqrt()
    bias = constants.bias - constants.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class ConvNorm(nn.Module):
    """A convolution of stride 1 that keeps the size, with a bias or a batch norm and without an activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm == "none")
        self.norm = nn.Identity() if norm == "none" else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x, self.conv, self.norm)


class Convs(nn.Sequential):
    """`count` convolutions of 3x3, each followed by ReLU."""

    def __init__(self, in_channels: int, channels: int, count: int, norm: Norm = "none") -> None:
        widths = [in_channels, *[channels] * count]
        super().__init__(*(ConvNorm(a, b, 3, norm) for a, b in pairwise(widths)))

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for conv in self:
            x = F.relu(conv(x), inplace=True)
        return x


BY_OUTPUTS = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")  # He et al. 2015
BY_INPUTS = partial(nn.init.kaiming_uniform_, a=1)  # Detectron, for layers with far more inputs than outputs


def initialise(module: nn.Module, draw: Callable[[Tensor], object] = BY_OUTPUTS) -> None:
    """Draw the weights of every convolution and linear layer in `module` with `draw`, and set biases to zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
