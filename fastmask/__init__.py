"""Triton kernels for two-stage detectors, behind drop-in PyTorch operators."""

from fastmask.kernels.roi_align import multiscale_roi_align, roi_align

__all__ = ["multiscale_roi_align", "roi_align"]
