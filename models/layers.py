"""Convolution and normalisation as one step."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.config import Norm


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """`norm(conv(x))`. Statistics that stay as they are go into the weights: a pass over the activations less."""
    if isinstance(norm, nn.Identity):
        return conv(x)
    if norm.training and not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class ConvNorm(nn.Module):
    """A convolution of stride 1 that keeps the size, its bias or its normalisation, and no activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm == "none")
        self.norm = nn.Identity() if norm == "none" else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x, self.conv, self.norm)


def initialise(module: nn.Module, std: float | None = None) -> None:
    """Draw the weights of every layer in `module`: normal of `std`, or so that activations keep their variance.

    Without `std`, convolutions are drawn as in He et al. 2015, and fully connected layers, which join far more inputs
    than they have outputs, as in Detectron: uniform, by their inputs.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if std is not None:
                nn.init.normal_(layer.weight, std=std)
            elif isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
            else:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
