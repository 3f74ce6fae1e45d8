"""Triton kernels for two-stage detectors, behind drop-in PyTorch operators."""

from fastmask import box_ops
from fastmask.kernels.decode_keypoints import decode_keypoints
from fastmask.kernels.encode_rle import encode_bitmaps, encode_rle, encode_rle_padded
from fastmask.kernels.keypoint_loss import keypoint_loss
from fastmask.kernels.mask_loss import mask_loss
from fastmask.kernels.mask_targets import mask_targets
from fastmask.kernels.match_boxes import match_boxes
from fastmask.kernels.nms import batched_nms, nms, nms_padded
from fastmask.kernels.paste_masks import paste_masks
from fastmask.kernels.preprocess import preprocess, resized_shape
from fastmask.kernels.roi_align import multiscale_roi_align, roi_align
from fastmask.kernels.roi_pool import multiscale_roi_pool, roi_pool
from fastmask.kernels.roi_warp import multiscale_roi_warp, roi_warp
from fastmask.kernels.sample_matches import sample_matches
from fastmask.kernels.select_detections import select_detections
from fastmask.kernels.select_mask_logits import select_mask_logits
from fastmask.kernels.select_proposals import select_proposals
from fastmask.kernels.soft_nms import soft_nms
from fastmask.masks import Masks
from fastmask.modules import MultiScaleRoIAlign, RoIAlign, RoIPool, RoIWarp

__version__ = "0.1.0"

__all__ = [
    "Masks",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "RoIPool",
    "RoIWarp",
    "batched_nms",
    "box_ops",
    "decode_keypoints",
    "encode_bitmaps",
    "encode_rle",
    "encode_rle_padded",
    "keypoint_loss",
    "mask_loss",
    "mask_targets",
    "match_boxes",
    "multiscale_roi_align",
    "multiscale_roi_pool",
    "multiscale_roi_warp",
    "nms",
    "nms_padded",
    "paste_masks",
    "preprocess",
    "resized_shape",
    "roi_align",
    "roi_pool",
    "roi_warp",
    "sample_matches",
    "select_detections",
    "select_mask_logits",
    "select_proposals",
    "soft_nms",
]
