"""Preprocessing: images are resized, normalised and padded to a batch, the input of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

import fastmask
from models.config import InputConfig
from models.marks import mark


class ImageBatch(NamedTuple):
    """Images of one padded size."""

    images: Tensor  # [B, 3, H, W], normalised, channels_last, zero at the right and the bottom
    sizes: Tensor  # [B, 2] int64: height and width before padding


def resize(image: Tensor, min_size: int, max_size: int) -> Tensor:
    """Resize an image for training to `fastmask.resized_shape`, bilinearly and with antialiasing.

    Args:
        image: uint8 `[3, H, W]`.
        min_size, max_size: as for `fastmask.resized_shape`.
    """
    shape = fastmask.resized_shape(image.shape[-2], image.shape[-1], min_size, max_size)
    return image if image.shape[-2:] == shape else functional.resize(image, list(shape), antialias=True)


@mark("preprocess")
def batch(images: Sequence[Tensor], config: InputConfig) -> ImageBatch:
    """Normalise images and pad them, at the right and the bottom, to one size that the strides divide.

    Args:
        images: uint8 RGB, `[3, H, W]` each, all on one device.
        config: mean, standard deviation, order of channels, divisor.

    Returns:
        The padded images, in autocast's dtype where it is enabled, else float32; and their sizes, on that device.

    Raises:
        ValueError: there is no image, or one has another shape.
        TypeError: the images have several dtypes.
    """
    padded, sizes, _ = fastmask.preprocess(images, **_options(images, config))
    return ImageBatch(padded, sizes)


@mark("preprocess")
def preprocess(
    images: Sequence[Tensor], config: InputConfig, device: torch.device
) -> tuple[ImageBatch, tuple[tuple[int, int], ...]]:
    """Move images to a device, and resize, normalise and pad them there.

    Args:
        images: uint8 RGB, `[3, H, W]` each, of any sizes and on any device.
        config: sizes, and as for `batch`.
        device: of the batch.

    Returns:
        The batch as from `batch`, and (height, width) of each image in it.

    Raises:
        ValueError, TypeError: as for `batch`.
    """
    images = [image.to(device, non_blocking=True) for image in images]
    padded, sizes, shapes = fastmask.preprocess(
        images, min_size=config.min_size, max_size=config.max_size, **_options(images, config)
    )
    return ImageBatch(padded, sizes), shapes


def _options(images: Sequence[Tensor], config: InputConfig) -> dict[str, Any]:
    kind = images[0].device.type if images else "cpu"
    return {
        "mean": config.pixel_mean,
        "std": config.pixel_std,
        "channels": config.channels,
        "divisor": config.divisor,
        "dtype": torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32,
    }
