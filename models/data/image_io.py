"""Pictures of any kind as RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from models.data.problems import DataError


def read_image(path: Path) -> Tensor:
    """Read a picture as uint8 RGB `[3, H, W]`, turned upright as its EXIF says.

    Gray is repeated, an alpha channel dropped, palettes and CMYK are converted, of 16 bits the upper 8 are kept.

    Raises:
        DataError: the file is missing, truncated, or no picture that Pillow reads.
    """
    try:
        with Image.open(path) as image:
            image.load()  # here a truncated file shows
            ImageOps.exif_transpose(image, in_place=True)
            return pil_to_tensor(_rgb(image))
    except FileNotFoundError:
        raise DataError("missing image", f"{path}: expected an image, got no such file") from None
    except UnidentifiedImageError:
        raise DataError(
            "unreadable image", f"{path}: expected an image, got a file that Pillow does not know"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow's decoders raise
        raise DataError("unreadable image", f"{path}: expected a whole image, got one with an error: {error}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"mode: expected 8 or 16 bits per channel, got {image.mode}")
    if image.mode.startswith("I;16"):  # Pillow's conversion would saturate at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:  # Pillow warns where it cannot keep the transparent colour of a palette
        image = image.convert("RGBA")
    return image.convert("RGB")
