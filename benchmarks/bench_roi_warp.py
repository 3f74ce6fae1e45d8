"""RoIWarp over the feature map of a C4 (He et al. 2017, Table 2c)."""

from __future__ import annotations

import torch
import torchvision

import fastmask
from benchmarks.harness.operators import Call, Draw, Operator
from tests.oracles.roi_align import draw_boxes, draw_pyramid
from tests.oracles.roi_pool import warped_boxes


def _calls(device: str, seed: int) -> list[Call]:
    (feature,) = draw_pyramid([(6, 7)], seed=seed, layout=torch.channels_last)
    feature, boxes = feature.to(device).requires_grad_(), draw_boxes(3, 2, 24, seed).to(device)
    arguments = {"input": feature, "boxes": boxes, "output_size": 2, "spatial_scale": 0.25, "sampling_ratio": 2}
    return [Call(fastmask.roi_warp, arguments), Call(fastmask.roi_warp, {**arguments, "reduction": "max"})]


def _check_random(draw: Draw, device: str) -> None:
    """A random call is torchvision's RoIAlign of rounded boxes."""
    ranges = ((1, 2), (1, 20), (1, 9), (1, 9), (0, 3), (1, 3), (1, 3), (-1, 3))
    n, c, h, w, k, ph, pw, ratio = (draw.integer(low, high) for low, high in ranges)
    scale = draw.choice([1.0, 0.5, 0.25])  # exact, so that the oracle rounds the same products
    rows = [[draw.integer(0, n - 1), *(draw.number(-20, 40) for _ in range(4))] for _ in range(k)]
    boxes = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    (feature,) = draw_pyramid([(h, w)], images=n, channels=c)
    expected = torchvision.ops.roi_align(feature, warped_boxes(boxes, scale), (ph, pw), 1.0, ratio)
    actual = fastmask.roi_warp(feature.to(device), boxes.to(device), (ph, pw), scale, ratio)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


# It launches the kernels of RoIAlign, whose declaration has their compile cases and limits.
OPERATOR = Operator(calls=_calls, compile_cases={}, limits={}, check_random=_check_random)
