"""Triton kernels for two-stage detectors, behind drop-in PyTorch operators."""

from fastmask import box_ops
from fastmask.kernels.nms import batched_nms, nms, nms_padded
from fastmask.kernels.paste_masks import paste_masks
from fastmask.kernels.roi_align import multiscale_roi_align, roi_align
from fastmask.kernels.roi_pool import multiscale_roi_pool, roi_pool
from fastmask.kernels.roi_warp import multiscale_roi_warp, roi_warp
from fastmask.modules import MultiScaleRoIAlign, RoIAlign, RoIPool, RoIWarp

__version__ = "0.1.0"

__all__ = [
    "MultiScaleRoIAlign",
    "RoIAlign",
    "RoIPool",
    "RoIWarp",
    "batched_nms",
    "box_ops",
    "multiscale_roi_align",
    "multiscale_roi_pool",
    "multiscale_roi_warp",
    "nms",
    "nms_padded",
    "paste_masks",
    "roi_align",
    "roi_pool",
    "roi_warp",
]
