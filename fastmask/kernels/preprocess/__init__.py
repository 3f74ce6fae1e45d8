"""Preprocessing: images of any sizes are resized, normalised and padded to one batch, the input of a backbone.

    out[b, c, y, x] = (resized[b, c, y, x] - mean[c]) / std[c]        0 to the right of the image and below it

Resizing is separable. Along an axis of n pixels that becomes m pixels, with s = n / m, output pixel i lies at

    p = (i + 1/2) * s - 1/2          weight of pixel j:  max(0, 1 - |j - p| / r)

- `antialias=True`: r = max(s, 1), and the weights are divided by their sum. This is the triangle filter of Pillow,
  `torch.nn.functional.interpolate(antialias=True)` and torchvision's `resize`.
- `antialias=False`: r = 1, and p is clamped to the image: `interpolate(align_corners=False)`.

An axis that keeps its length is not resampled: the result is (x - mean) / std to the bit. Everything is computed in
float32. torchvision's `resize` rounds uint8 images to whole grey levels after each axis, up to half a level each time;
here only the result is rounded, to its dtype.

B images, H x W the padded size. One launch reads uint8 pixels, in any strides, and writes each output byte once, in
channels_last: 0.9 MB and 5.2 MB for an image of 480 x 640 that becomes 800 x 1088 in bfloat16. PyTorch's operators also
write and read the resized image, in uint8 and float32. Deterministic: no atomics, one writer per element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import ceil_div, overridable
from fastmask.kernels._validation import (
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_pair,
    check_positive,
    check_same_device,
    check_sequence,
    check_tensor,
    describe,
)
from fastmask.kernels.preprocess.op import PreprocessSpec, preprocess_op

LAYOUTS = ("CHW", "HWC")
CHANNELS = ("RGB", "BGR")
ROUNDINGS = ("nearest", "down")
IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SIDE = 2**24 - 1  # pixels that float32 counts


class Preprocessed(NamedTuple):
    """Images of one padded size."""

    images: Tensor  # [B, 3, H, W], channels_last, zero at the right and the bottom
    sizes: Tensor  # [B, 2] int64: height and width before padding
    shapes: tuple[tuple[int, int], ...]  # the same on the host


def resized_shape(
    height: int, width: int, min_size: int, max_size: int | None = None, *, rounding: str = "nearest"
) -> tuple[int, int]:
    """Height and width of an image after `preprocess`, which keeps the aspect ratio up to rounding.

    Args:
        height, width: of the image, in pixels, positive.
        min_size: length of the shorter side, in pixels, positive.
        max_size: largest length of the longer side, in pixels, which takes precedence; None allows any.
        rounding: to whole pixels, `"nearest"`, or `"down"` as in torchvision's detectors; at least 1.

    Returns:
        Height and width, in pixels.

    Raises:
        ValueError: a size is not positive, or `rounding` is unknown.
        TypeError: a size is not an int, or `rounding` not a string.
    """
    height, width = check_int("height", height, least=1), check_int("width", width, least=1)
    scale = check_int("min_size", min_size, least=1) / min(height, width)
    if max_size is not None:
        scale = min(scale, check_int("max_size", max_size, least=1) / max(height, width))
    to_int = int if check_choice("rounding", rounding, ROUNDINGS) == "down" else round
    return max(to_int(height * scale), 1), max(to_int(width * scale), 1)


@overridable
def preprocess(
    images: Tensor | Sequence[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    min_size: int | None = None,
    max_size: int | None = None,
    rounding: str = "nearest",
    antialias: bool = True,
    channels: str = "RGB",
    layout: str = "CHW",
    divisor: int = 32,
    padded_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Preprocessed:
    """Resize, normalise and pad images to one batch.

    Args:
        images: RGB, `[3, H, W]` or, with `layout="HWC"`, `[H, W, 3]`, of any sizes and strides: a list of them, a batch
            with one dimension more, or one image, which becomes a batch of one. uint8, or floating in any range; all of
            one dtype and on one device.
        mean, std: three numbers each, in the order of `channels` and the range of `images`; `std` is positive.
        min_size, max_size, rounding: as for `resized_shape`; images keep their sizes if `min_size` is None.
        antialias: whether images that shrink are filtered first, as Pillow does and torchvision's detectors do not.
        channels: the order of the channels in the result, `"RGB"` or `"BGR"`.
        layout: of `images`, `"CHW"` or `"HWC"`.
        divisor: heights and widths are padded to the least multiple of this that holds every image.
        padded_size: height and width of the result, instead of `divisor`: one for every batch, as CUDA graphs need.
        dtype: of the result, float32, float16 or bfloat16.

    Returns:
        A tuple with names: `images [B, 3, H, W]`, in channels_last, with zeros at the right and the bottom;
        `sizes [B, 2]` int64, the heights and widths before padding, on the device of the images; `shapes`, the same
        as tuples on the host. Nothing synchronises. There is no gradient.

    Raises:
        ValueError: there is no image, or one has another shape, a side of 0 or of more than 2^24 - 1 pixels; images are
            on two devices or do not fit `padded_size`; a number is outside its range, or a choice is unknown.
        TypeError: `images` are not dense tensors, all uint8 or all of one floating dtype that is not float64, or
            another argument has a wrong type.

    Source: He et al. 2017, Mask R-CNN, §3.1; the sizes are those of Detectron.
    """
    images = _check_images(images, check_choice("layout", layout, LAYOUTS))
    shapes = [(image.shape[1], image.shape[2]) for image in images]
    rounding = check_choice("rounding", rounding, ROUNDINGS)
    if min_size is not None:
        shapes = [resized_shape(*shape, min_size, max_size, rounding=rounding) for shape in shapes]
        if max(map(max, shapes)) > MAX_SIDE:
            raise ValueError(f"min_size: expected sides below 2^24, got {min_size}, and so {max(shapes)}")
    elif max_size is not None:
        raise ValueError(f"max_size: expected None without min_size, got {describe(max_size)}")
    largest = tuple(map(max, zip(*shapes, strict=True)))
    if padded_size is None:
        divisor = check_int("divisor", divisor, least=1)
        height, width = (ceil_div(side, divisor) * divisor for side in largest)
        if max(height, width) > MAX_SIDE:
            raise ValueError(f"divisor: expected sides below 2^24, got {divisor}, and so {(height, width)}")
    else:
        height, width = check_pair("padded_size", padded_size, most=MAX_SIDE)
        if height < largest[0] or width < largest[1]:
            raise ValueError(f"padded_size: expected at least {largest}, got {(height, width)}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {describe(dtype)}")
    spec = PreprocessSpec(
        height=height,
        width=width,
        mean=[check_float("mean", value) for value in _check_three("mean", mean)],
        std=[check_positive("std", value) for value in _check_three("std", std)],
        channels=check_choice("channels", channels, CHANNELS),
        antialias=check_flag("antialias", antialias),
        dtype=dtype,
    )
    out, sizes = preprocess_op(images, [side for shape in shapes for side in shape], *spec)
    return Preprocessed(out, sizes, tuple(shapes))


def _check_images(images: Any, layout: str) -> list[Tensor]:
    """Images as `[3, H, W]` views, detached."""
    if isinstance(images, Tensor):
        images = [images] if images.ndim == 3 else images.unbind(0) if images.ndim == 4 else [images]
    views = []
    for image in check_sequence("images", images, "Tensors"):
        check_tensor("images", image)
        if image.dtype not in IMAGE_DTYPES:
            raise TypeError(f"images: expected uint8, float16, bfloat16 or float32, got {image.dtype}")
        channel = 0 if layout == "CHW" else -1
        if image.ndim != 3 or image.shape[channel] != 3:
            form = "[3, H, W]" if layout == "CHW" else "[H, W, 3]"
            raise ValueError(f"images: expected {form}, got {list(image.shape)}")
        view = image.detach().movedim(channel, 0)
        if not view.numel() or max(view.shape) > MAX_SIDE:
            raise ValueError(f"images: expected sides of 1 to 2^24 - 1 pixels, got {list(image.shape)}")
        views.append(view)
    if not views:
        raise ValueError("images: expected at least one, got none")
    for view in views:
        check_same_device("images", view, "the first", views[0])
        if view.dtype != views[0].dtype:
            raise TypeError(f"images: expected one dtype, got {views[0].dtype} and {view.dtype}")
    return views


def _check_three(name: str, values: Any) -> list[Any]:
    values = check_sequence(name, values, "three numbers")
    if len(values) != 3:
        raise ValueError(f"{name}: expected three numbers, got {describe(values)}")
    return values
