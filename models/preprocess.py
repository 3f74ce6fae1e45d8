"""From pictures to what the backbone reads: resized, normalised, padded to one size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from models.config import InputConfig


def resized_shape(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width whose shorter side is `min_size`, or whose longer one is `max_size` where that is less."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def resize(image: Tensor, min_size: int, max_size: int) -> Tensor:
    """Resize an image `[3, H, W]` to `resized_shape`, bilinear and antialiased."""
    shape = resized_shape(*image.shape[-2:], min_size, max_size)
    return image if image.shape[-2:] == shape else functional.resize(image, list(shape), antialias=True)


def batch(images: Sequence[Tensor], config: InputConfig) -> tuple[Tensor, Tensor]:
    """Normalise images and pad them, at the right and the bottom, to one size that the strides divide.

    Args:
        images: uint8 RGB, `[3, H, W]` each, on the device to work on.
        config: mean, standard deviation, order of channels, divisor.

    Returns:
        `[B, 3, H, W]` float32, channels_last; and the sizes before padding, `[B, 2]` int64, (height, width).
    """
    if not images:
        raise ValueError("images: expected at least one, got none")
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"images: expected uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    device = images[0].device
    mean = torch.tensor(config.pixel_mean, device=device)[:, None, None]
    std = torch.tensor(config.pixel_std, device=device)[:, None, None]
    height, width = (
        -(-max(image.shape[axis] for image in images) // config.divisor) * config.divisor for axis in (1, 2)
    )
    shape = (len(images), 3, height, width)
    padded = torch.empty(shape, device=device, memory_format=torch.channels_last).zero_()
    for image, place in zip(images, padded, strict=True):
        pixels = image.flip(0) if config.channels == "BGR" else image
        place[:, : image.shape[1], : image.shape[2]] = (pixels - mean) / std
    return padded, torch.tensor([image.shape[1:] for image in images], device=device)
