"""Reading image files of any mode as RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2.functional import pil_to_tensor

from models.data.problems import DataError


def read_image(path: Path) -> Tensor:
    """Read an image as uint8 RGB `[3, H, W]`, turned upright by its EXIF orientation.

    Grey values are repeated over the channels, an alpha channel is dropped, palettes and CMYK are converted, and of
    16-bit values the upper 8 bits are kept. torchvision decodes JPEG files of gray and colour images, which takes half
    of Pillow's time, and Pillow all others.

    Args:
        path: of a file in any format that Pillow reads.

    Raises:
        DataError: the file is missing, truncated, or not an image that Pillow can read.
    """
    try:
        with Image.open(path) as image:  # reads the header alone
            if image.format == "JPEG" and image.mode in ("L", "RGB") and (decoded := _decode_jpeg(path)) is not None:
                return decoded
            image.load()  # raises if the file is truncated
            ImageOps.exif_transpose(image, in_place=True)
            return pil_to_tensor(_rgb(image))
    except FileNotFoundError:
        raise DataError("missing image", f"{path}: expected an image, got no such file") from None
    except UnidentifiedImageError:
        raise DataError(
            "unreadable image", f"{path}: expected an image, got a file that Pillow does not know"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # raised by Pillow's decoders
        raise DataError("unreadable image", f"{path}: expected a whole image, got one with an error: {error}") from None


def _decode_jpeg(path: Path) -> Tensor | None:
    """The image, upright; None if torchvision cannot decode it. Pillow then can, or says why not."""
    try:
        return decode_image(read_file(str(path)), ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError:
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"mode: expected 8 or 16 bits per channel, got {image.mode}")
    if image.mode.startswith("I;16"):  # Pillow's own conversion saturates at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:  # otherwise Pillow warns that it drops the transparent colour of a palette
        image = image.convert("RGBA")
    return image.convert("RGB")
