"""RoIWarp over the feature map of a C4 (He et al. 2017, §4.2, table 2c): 512 RoIs of 7 x 7.

Bytes and FLOPs are RoIAlign's. K RoIs, C channels, P bins along an axis, S samples along an axis of a bin. Bytes: the
pixels of the features that some RoI covers, read (forward), or the gradient of the features, written whole (backward);
the boxes; K * C * P^2 outputs. FLOPs: a multiply-add for each of the four neighbours of K * C * (P * S)^2 samples.
"""

from __future__ import annotations

import pytest
import torch

import fastmask
from benchmarks.harness.checks import parameters
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
    """torchvision has no RoIWarp, but its RoIAlign of boxes on whole pixels is one: the far edges belong to the box."""
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
