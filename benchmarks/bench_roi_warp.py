"""RoIWarp over the feature map of a C4 (He et al. 2017, §4.2, table 2c): 512 RoIs of 7 x 7.

Bytes and FLOPs are RoIAlign's. K RoIs, C channels, P bins along an axis, S samples along an axis of a bin. Bytes: the
pixels of the features that some RoI covers, read (forward), or the gradient of the features, written whole (backward);
the boxes; K * C * P^2 outputs. FLOPs: a multiply-add for each of the four neighbours of K * C * (P * S)^2 samples.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import fastmask
from benchmarks.harness.checks import parameters
from benchmarks.harness.operators import Call, Draw, Operator
from benchmarks.harness.pooling import (
    DIRECTIONS,
    Pool,
    c4_inputs,
    compare_passes,
    torchvision_ops,
    torchvision_provider,
)
from benchmarks.harness.workloads import C4, DTYPES, objects
from benchmarks.reporting.results import FASTMASK
from tests.oracles.roi_align import draw_boxes, draw_pyramid
from tests.oracles.roi_pool import warped_boxes

BINS, ROIS, SCALE = 7, 512, 1 / C4.stride
SAMPLES = 2


@pytest.mark.parametrize(
    ("dtype", "direction"),
    parameters(
        [(dtype, direction) for dtype in DTYPES for direction in DIRECTIONS],
        quick=lambda dtype, _: dtype == "float32",
    ),
)
def bench_c4(comparison, dtype, direction):
    """torchvision has no RoIWarp; its RoIAlign of boxes rounded to whole pixels, far edges included, is the same."""
    inputs = c4_inputs(comparison.device, objects(ROIS), dtype)
    (feature,), (boxes,) = inputs.features, inputs.boxes
    rois = torch.nn.functional.pad(boxes, (1, 0))
    low, high = (boxes.unflatten(1, (2, 2)) * SCALE).round().unbind(1)
    rounded = torch.cat([rois[:, :1], low, high.maximum(low) + 1], 1)
    pools: dict[str, Pool] = {
        FASTMASK: lambda: fastmask.roi_warp(feature, rois, BINS, SCALE, SAMPLES),
        torchvision_provider(dtype): lambda: torchvision_ops.roi_align(feature, rounded, BINS, 1.0, SAMPLES),
    }
    outputs = len(rois) * C4.channels * BINS**2
    compare_passes(
        comparison,
        f"{ROIS} RoIs 7x7, {dtype}, channels_last",
        direction,
        pools,
        inputs,
        bytes=inputs.bytes(direction, outputs=outputs * feature.itemsize),
        flops=outputs * SAMPLES**2 * 4 * 2,
    )


def _calls(device: str, seed: int) -> list[Call]:
    (feature,) = draw_pyramid([(6, 7)], seed=seed, layout=torch.channels_last)
    feature, boxes = feature.to(device).requires_grad_(), draw_boxes(3, 2, 24, seed).to(device)
    arguments = {"input": feature, "boxes": boxes, "output_size": 2, "spatial_scale": 0.25, "sampling_ratio": 2}
    return [Call(fastmask.roi_warp, arguments), Call(fastmask.roi_warp, {**arguments, "reduction": "max"})]


def _check_random(draw: Draw, device: str) -> None:
    """A random call agrees with torchvision's RoIAlign of rounded boxes."""
    ranges = ((1, 2), (1, 20), (1, 9), (1, 9), (0, 3), (1, 3), (1, 3), (-1, 3))
    n, c, h, w, k, ph, pw, ratio = (draw.integer(low, high) for low, high in ranges)
    scale = draw.choice([1.0, 0.5, 0.25])  # exact, so that the oracle rounds the same products
    rows = [[draw.integer(0, n - 1), *(draw.number(-20, 40) for _ in range(4))] for _ in range(k)]
    boxes = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    (feature,) = draw_pyramid([(h, w)], images=n, channels=c)
    expected = torchvision_ops.roi_align(feature, warped_boxes(boxes, scale), (ph, pw), 1.0, ratio)
    actual = fastmask.roi_warp(feature.to(device), boxes.to(device), (ph, pw), scale, ratio)
    assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


# RoIWarp launches the kernels of RoIAlign, whose declaration has their compile cases and limits.
OPERATOR = Operator(calls=_calls, compile_cases={}, limits={}, check_random=_check_random)
