"""Preprocessing: images are resized, normalised and padded to a batch, the input of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from models.config import InputConfig
from models.marks import mark


class ImageBatch(NamedTuple):
    """Images of one padded size."""

    images: Tensor  # [B, 3, H, W] float32, normalised, channels_last, zero at the right and the bottom
    sizes: Tensor  # [B, 2] int64: height and width before padding


def resized_shape(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width of an image after `resize`, which keeps the aspect ratio up to rounding.

    Args:
        height, width: of the image, in pixels.
        min_size: length of the shorter side, in pixels.
        max_size: largest length of the longer side, in pixels, which takes precedence.
    """
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


@mark("preprocess")
def resize(image: Tensor, min_size: int, max_size: int) -> Tensor:
    """Resize an image to `resized_shape`, bilinearly and with antialiasing.

    Args:
        image: `[3, H, W]`.
        min_size, max_size: as for `resized_shape`.
    """
    shape = resized_shape(image.shape[-2], image.shape[-1], min_size, max_size)
    return image if image.shape[-2:] == shape else functional.resize(image, list(shape), antialias=True)


@mark("preprocess")
def batch(images: Sequence[Tensor], config: InputConfig) -> ImageBatch:
    """Normalise images and pad them, at the right and the bottom, to one size that the strides divide.

    Args:
        images: uint8 RGB, `[3, H, W]` each, all on one device.
        config: mean, standard deviation, order of channels, divisor.

    Returns:
        The padded images and their sizes, on that device.

    Raises:
        ValueError: there is no image, or one is not uint8 `[3, H, W]`.
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
    for image, slot in zip(images, padded, strict=True):
        pixels = image.flip(0) if config.channels == "BGR" else image
        slot[:, : image.shape[1], : image.shape[2]] = (pixels - mean) / std
    return ImageBatch(padded, torch.tensor([image.shape[1:] for image in images], device=device))


def preprocess(images: Sequence[Tensor], config: InputConfig, device: torch.device) -> ImageBatch:
    """Move images to a device, `resize` them to the configured size and `batch` them.

    Args:
        images: uint8 RGB, `[3, H, W]` each, of any sizes and on any device.
        config: sizes, and the arguments of `batch`.
        device: where the images are resized.

    Returns:
        The padded images and their sizes, on `device`.

    Raises:
        ValueError: as for `batch`.
    """
    return batch([resize(image.to(device), config.min_size, config.max_size) for image in images], config)
