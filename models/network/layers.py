"""Convolution with normalisation, and the initialisation of layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.config import Norm

BatchNorm = nn.BatchNorm2d | FrozenBatchNorm2d


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: BatchNorm | nn.Identity) -> Tensor:
    """Compute `norm(conv(x))`. Constant statistics are folded into the weights, which saves a pass over activations.

    Args:
        x: `[N, C, H, W]`.
        conv: without a bias, if there is a norm.
        norm: a batch norm over the convolution's output, or `nn.Identity` for none.
    """
    if isinstance(norm, nn.Identity):
        return conv(x)
    if norm.training and not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    constants: Any = norm  # both kinds of batch norm have these tensors; only one declares them
    scale = constants.weight * (constants.running_var + constants.eps).rsqrt()
    bias = torch.addcmul(constants.bias, constants.running_mean, scale, value=-1)
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class ConvNorm(nn.Module):
    """A convolution of stride 1 that keeps the size, with a bias or a batch norm and without an activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm == "none")
        self.norm = nn.Identity() if norm == "none" else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, out_channels, H, W]`."""
        return conv_norm(x, self.conv, self.norm)


class Convs(nn.Sequential):
    """`count` 3x3 convolutions, each followed by a ReLU; without any, the input is returned."""

    def __init__(self, in_channels: int, channels: int, count: int, norm: Norm = "none") -> None:
        widths = [in_channels, *[channels] * count]
        super().__init__(*(ConvNorm(a, b, 3, norm) for a, b in pairwise(widths)))

    def forward(self, input: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, channels, H, W]`."""
        x = input
        for conv in self:
            x = F.relu(conv(x), inplace=True)
        return x


BY_OUTPUTS = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")  # He et al. 2015
BY_INPUTS = partial(nn.init.kaiming_uniform_, a=1)  # Detectron, for layers with far more inputs than outputs


def initialise(module: nn.Module, draw: Callable[[Tensor], object] = BY_OUTPUTS) -> None:
    """Initialise every convolution and linear layer in `module`, in place; biases become zero.

    Args:
        module: the layers, or a module that contains them.
        draw: fills a weight with random values.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
