"""The arguments that every RoI pooling operator takes, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.kernels._runtime import compute_dtype, empty, is_channels_last

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_features(features: Sequence[Tensor], name: str) -> list[Tensor]:
    """The levels `[N, C, H_l, W_l]` in their widest dtype."""
    if not features:
        raise ValueError(f"{name}: expected at least one level, got none")
    first = features[0]
    dtype = first.dtype
    for feature in features:
        if feature.dtype not in FEATURE_DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {feature.dtype}")
        if feature.ndim != 4 or feature.shape[:2] != first.shape[:2]:
            shapes = [list(feature.shape) for feature in features]
            raise ValueError(f"{name}: expected [N, C, H, W] with the same N and C at each level, got {shapes}")
        if max(feature.shape[2:]) >= 2**30:  # what pack_size holds
            raise ValueError(f"{name}: expected sides below 2^30, got {list(feature.shape)}")
        if feature.device != first.device:
            raise ValueError(f"{name}: expected all levels on {first.device}, got {feature.device}")
        dtype = torch.promote_types(dtype, feature.dtype)
    return [feature.to(dtype) for feature in features]


def roi_format(boxes: Tensor | Sequence[Tensor], features: Tensor) -> Tensor:
    """Boxes `[K, 5]`, `(image, x1, y1, x2, y2)`, in the dtype that coordinates of `features` are kept in."""
    dtype = compute_dtype(features.dtype)
    if isinstance(boxes, Tensor):
        _check_boxes(boxes, 5, features)
        return boxes.to(dtype)
    if len(boxes) > features.shape[0]:
        raise ValueError(f"boxes: expected at most one tensor per image, {features.shape[0]}, got {len(boxes)}")
    rois = [features.new_empty((0, 5), dtype=dtype)]
    for image, in_image in enumerate(boxes):
        _check_boxes(in_image, 4, features)
        # Upcast first: bfloat16 cannot hold the image index 257.
        rois.append(torch.nn.functional.pad(in_image.to(dtype), (1, 0), value=image))
    return torch.cat(rois)


def image_indices(boxes: Tensor, images: int) -> Tensor:
    """Column 0 of CPU boxes `[K, 5]`, int64, each known to be in [0, images)."""
    index = boxes[:, 0]
    wrong = (~((index >= 0) & (index < images))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"boxes: expected image indices in [0, {images}) in column 0, got {index[row]:g} in row {row}")
    return index.long()


def _check_boxes(boxes: Tensor, columns: int, features: Tensor) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != columns:
        form = "[K, 5], or a list of [L, 4]" if columns == 5 else "a list of [L, 4], or [K, 5]"
        raise ValueError(f"boxes: expected {form}, got {list(boxes.shape)}")
    if not boxes.is_floating_point():
        raise TypeError(f"boxes: expected a floating dtype, got {boxes.dtype}")
    if boxes.device != features.device:
        raise ValueError(f"boxes: expected on {features.device} like the features, got {boxes.device}")


def checked_output_size(output_size: int | Sequence[int]) -> tuple[int, int]:
    """`(PH, PW)`, both at least 1."""
    size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"output_size: expected a number of bins >= 1, or two, got {output_size}")
    return size


def checked_scales(scales: Sequence[float], count: int, name: str) -> list[float]:
    """`count` positive finite numbers."""
    scales = [float(scale) for scale in scales]
    if len(scales) != count or not all(0 < scale < float("inf") for scale in scales):
        raise ValueError(f"{name}: expected {count} positive finite, got {scales}")
    return scales


def empty_pooled(
    features: Sequence[Tensor], boxes: Tensor, pooled_height: int, pooled_width: int, maximum: bool
) -> tuple[Tensor, Tensor]:
    """Memory for pooled features in the format of the first level, and for the maximum's argmax."""
    first = features[0]
    shape = (boxes.shape[0], first.shape[1], pooled_height, pooled_width)
    output = empty(first, shape, is_channels_last(first))
    argmax = empty(first, shape if maximum else (0, 0, 0, 0), is_channels_last(first), torch.int32)
    return output, argmax
