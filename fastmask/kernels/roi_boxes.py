"""The arguments that every RoI pooling operator takes, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.kernels._runtime import compute_dtype


def roi_format(boxes: Tensor | Sequence[Tensor], features: Tensor) -> Tensor:
    """Boxes `[K, 5]`, `(image, x1, y1, x2, y2)`, in the dtype that coordinates of `features` are kept in."""
    dtype = compute_dtype(features.dtype)
    if isinstance(boxes, Tensor):
        _check_boxes(boxes, 5, features)
        return boxes.to(dtype)
    if len(boxes) > features.shape[0]:
        raise ValueError(
            f"boxes: expected at most one tensor per image, {features.shape[0]}, got {len(boxes)}"
        )
    rois = [features.new_empty((0, 5), dtype=dtype)]
    for image, in_image in enumerate(boxes):
        _check_boxes(in_image, 4, features)
        # Upcast first: bfloat16 cannot hold the image index 257.
        rois.append(torch.nn.functional.pad(in_image.to(dtype), (1, 0), value=image))
    return torch.cat(rois)


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
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    if height < 1 or width < 1:
        raise ValueError(f"output_size: expected bins >= 1, got {output_size}")
    return height, width
