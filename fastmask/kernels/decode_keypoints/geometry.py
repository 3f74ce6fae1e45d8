"""Constants that the reference and the kernel of `decode_keypoints` share."""

from __future__ import annotations

import torch

CONVENTIONS = ("torchvision", "detectron2")

# A heatmap is resized to at most this many pixels along each axis, so that no box takes forever.
MAX_SIDE = 8192

# What the two outer weights of the cubic convolution sum to below 0, at most: 3/4 * t * (1 - t) at t = 1/2.
EXCESS = 3 / 16

# Bounds and values are rounded, each by less than 16 ulp of the heatmap's largest magnitude. A cell is left out only
# if its bound is below the best value by more than this share of the magnitude.
SLACK = {torch.float32: 2.0**-18, torch.float64: 2.0**-47}
