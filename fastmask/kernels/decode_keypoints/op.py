"""`decode_keypoints` registered with PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastmask.kernels._runtime import compute_dtype, register
from fastmask.kernels.decode_keypoints.forward import launch_decode_keypoints
from fastmask.kernels.decode_keypoints.reference import decode_keypoints_reference


def _fake_decode_keypoints(heatmaps: Tensor, boxes: Tensor, convention: str) -> tuple[Tensor, Tensor]:
    del boxes, convention
    count, points = heatmaps.shape[:2]
    dtype = compute_dtype(heatmaps.dtype)
    return heatmaps.new_empty((count, points, 3), dtype=dtype), heatmaps.new_empty((count, points), dtype=dtype)


decode_keypoints_operator = register(
    "decode_keypoints(Tensor heatmaps, Tensor boxes, str convention) -> (Tensor keypoints, Tensor scores)",
    reference=decode_keypoints_reference,
    launch=launch_decode_keypoints,
    fake=_fake_decode_keypoints,
)
