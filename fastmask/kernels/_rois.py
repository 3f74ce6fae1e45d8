"""What the RoI operators share: checks of their arguments and the format of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels._validation import (
    MAX_INT32,
    check_int,
    check_pair,
    check_positive,
    check_same_device,
    check_sequence,
    check_tensor,
)

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("mean", "max")
MAX_SIDE = 2**30 - 1  # what `pack_size` holds


def check_features(name: str, levels: Sequence[Any]) -> list[Tensor]:
    """L >= 1 levels `[N, C, H_l, W_l]`, promoted to one dtype."""
    if not levels:
        raise ValueError(f"{name}: expected at least one level, got none")
    shapes = []
    for feature in levels:
        check_tensor(name, feature)
        if feature.dtype not in FEATURE_DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {feature.dtype}")
        shape = feature.shape
        if len(shape) != 4:
            raise ValueError(f"{name}: expected [N, C, H, W], got {list(shape)}")
        if shape[2] > MAX_SIDE or shape[3] > MAX_SIDE:
            raise ValueError(f"{name}: expected sides below 2^30, got {list(shape)}")
        shapes.append(shape)
    first, (num_images, channels, _, _) = levels[0], shapes[0]
    dtype, device, mixed = first.dtype, first.device, False
    for feature, shape in zip(levels[1:], shapes[1:], strict=True):
        if shape[0] != num_images or shape[1] != channels:
            raise ValueError(
                f"{name}: expected the same N and C at each level, got {[list(shape) for shape in shapes]}"
            )
        if feature.device != device:
            raise ValueError(f"{name}: expected all levels on {device}, got {feature.device}")
        if feature.dtype != dtype:
            dtype, mixed = torch.promote_types(dtype, feature.dtype), True
    return [feature.to(dtype) for feature in levels] if mixed else list(levels)


def to_rois(boxes: Any, features: Tensor, features_name: str) -> Tensor:
    """Boxes `[K, 5]`, `(image, x1, y1, x2, y2)`, in the dtype of coordinates, from either form that users pass."""
    dtype = compute_dtype(features.dtype)
    if isinstance(boxes, Tensor):
        _check_boxes(boxes, 5, features, features_name)
        return boxes if boxes.dtype == dtype else boxes.to(dtype)
    per_image = check_sequence("boxes", boxes, "Tensors")
    if len(per_image) > features.shape[0]:
        raise ValueError(f"boxes: expected at most one tensor per image, {features.shape[0]}, got {len(per_image)}")
    rois = [features.new_empty((0, 5), dtype=dtype)]
    for image, in_image in enumerate(per_image):
        _check_boxes(in_image, 4, features, features_name)
        # Upcast first: bfloat16 cannot hold the image index 257.
        rois.append(torch.nn.functional.pad(in_image.to(dtype), (1, 0), value=image))
    return torch.cat(rois)


def _check_boxes(boxes: Any, columns: int, features: Tensor, features_name: str) -> None:
    check_tensor("boxes", boxes, floating=True)
    if boxes.ndim != 2 or boxes.shape[1] != columns:
        form = "[K, 5], or a list of [L, 4]" if columns == 5 else "a list of [L, 4], or [K, 5]"
        raise ValueError(f"boxes: expected {form}, got {list(boxes.shape)}")
    check_same_device("boxes", boxes, features_name, features)


def image_indices(boxes: Tensor, num_images: int) -> Tensor:
    """Column 0 of CPU boxes `[K, 5]`, int64, checked to be in [0, num_images)."""
    index = boxes[:, 0]
    wrong = (~((index >= 0) & (index < num_images))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"boxes: expected image indices in [0, {num_images}) in column 0, got {index[row]:g} in row {row}"
        )
    return index.long()


def check_output_size(output_size: Any, channels: int = 1) -> tuple[int, int]:
    """`(PH, PW)`, both at least 1: kernels index the PH * PW * C outputs of a RoI with 32 bits."""
    if isinstance(output_size, Sequence):
        height, width = check_pair("output_size", output_size, least=1)
    else:
        height = width = check_int("output_size", output_size, least=1)
    if height * width * max(channels, 1) > MAX_INT32:
        raise ValueError(
            f"output_size: expected fewer than 2^31 outputs per RoI of {channels} channels, got {height} x {width} bins"
        )
    return height, width


def check_sampling_ratio(sampling_ratio: Any, output_size: tuple[int, int]) -> int:
    """Samples per bin and axis: kernels number the samples of a RoI with 32 bits."""
    ratio = check_int("sampling_ratio", sampling_ratio)
    if ratio > 0 and ratio**2 * output_size[0] * output_size[1] > MAX_INT32:
        raise ValueError(f"sampling_ratio: expected fewer than 2^31 samples per RoI, got {ratio}")
    return ratio


def check_scales(name: str, scales: Any, count: int) -> list[float]:
    """One positive finite number for each of `count` levels."""
    checked = [check_positive(name, scale) for scale in check_sequence(name, scales, "numbers")]
    if len(checked) != count:
        raise ValueError(f"{name}: expected one for each of {count} levels, got {checked}")
    return checked
