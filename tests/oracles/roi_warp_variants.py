"""Small calls of RoIAlign's kernels with rounded boxes, and torchvision's RoIAlign of such boxes level by level."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision

from fastmask import multiscale_roi_warp
from tests.oracles.budget import BUDGET
from tests.oracles.roi_align import draw_pyramid
from tests.oracles.roi_pool import draw_pyramid_and_boxes, pool_by_level, warped_boxes

torchvision_ops: Any = torchvision.ops  # torch.fx.wrap hides the types of its functions

SIZES = [(9, 7), (5, 4), (3, 2)]


def warp_by_level(features, boxes, size, scales, ratio, canonical_box_size):
    """torchvision's RoIAlign of boxes that are rounded on their level."""

    def pool(feature, rois, scale):
        return torchvision_ops.roi_align(feature, warped_boxes(rois, scale), size, 1.0, ratio)

    return pool_by_level(pool, features, boxes, scales, canonical_box_size)


def check_pyramid(device, *, dtype=torch.float32, layout=torch.channels_last, levels=2, ratio=2, channels=5):
    """Output and gradients agree with torchvision's, of features of the same values in float64."""
    scales: list[float] = [2.0 ** -(level + 1) for level in range(levels)]
    _, boxes = draw_pyramid_and_boxes(SIZES[:1], boxes=6, seed=levels)
    features = draw_pyramid(SIZES[:levels], dtype, channels=channels, layout=layout)
    wide = [feature.double().requires_grad_() for feature in features]
    leaves = [feature.to(device).requires_grad_() for feature in features]
    expected = warp_by_level(wide, boxes.double(), (2, 2), scales, ratio, 20)
    grad = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    output = multiscale_roi_warp(leaves, boxes.to(device), (2, 2), scales, ratio, canonical_box_size=20)
    budget = 8 * BUDGET[dtype]
    torch.testing.assert_close(output.detach().double().cpu(), expected.detach(), rtol=budget, atol=budget)
    grads = torch.autograd.grad(output, leaves, grad.to(device))
    for actual, gradient in zip(grads, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        torch.testing.assert_close(actual.double().cpu(), gradient, rtol=budget, atol=budget)


VARIANTS: dict[str, Callable[[str], None]] = {
    "pyramid": partial(check_pyramid, levels=3),
    "pyramid, NCHW": partial(check_pyramid, layout=torch.contiguous_format),
    "pyramid, adaptive": partial(check_pyramid, ratio=-1),
    "pyramid, bfloat16": partial(check_pyramid, dtype=torch.bfloat16, channels=16),
    "pyramid, float16": partial(check_pyramid, dtype=torch.float16, channels=16),
}
