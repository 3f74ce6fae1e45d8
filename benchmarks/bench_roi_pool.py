"""RoIPool over the feature map of a C4 (He et al. 2017, §4.2, table 2c): 512 RoIs of 7 x 7.

Bytes: the pixels of the features that some RoI covers, read (forward), or the gradient of the features, written whole
(backward); the boxes; the outputs, and the position of each maximum (32 bits). FLOPs: a comparison for each pixel of
each RoI (forward), or an addition for each output (backward).
"""

from __future__ import annotations

from typing import Unpack

import pytest
import torch
from torch import Tensor

import fastmask
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.machine import PEERS, peer
from benchmarks.harness.pooling import (
    DIRECTIONS,
    Direction,
    Pool,
    c4_inputs,
    compare_passes,
    torchvision_ops,
    torchvision_provider,
)
from benchmarks.harness.workloads import ADVERSARIAL, C4, DTYPES, LAYOUTS, objects
from benchmarks.reporting.results import FASTMASK

BINS, ROIS, SCALE = 7, 512, 1 / C4.stride


def compare_on_map(
    comparison: Comparison,
    name: str,
    direction: Direction,
    boxes: Tensor,
    *,
    dtype: str | None = None,
    layout: str = "channels_last",
    **options: Unpack[CaseOptions],
) -> None:
    """Compare `[K, 4]` boxes on the feature map of a C4; by default in the main dtype of the device."""
    inputs = c4_inputs(comparison.device, boxes, dtype or comparison.main_dtype, layout)
    (feature,), (boxes,) = inputs.features, inputs.boxes
    rois = torch.nn.functional.pad(boxes, (1, 0))

    def torchvision_pool() -> Tensor:  # what autocast would do: on a CPU it does not know the operator
        return torchvision_ops.roi_pool(feature.float(), rois, BINS, SCALE).to(feature.dtype)

    pools: dict[str, Pool] = {
        FASTMASK: lambda: fastmask.roi_pool(feature, rois, BINS, SCALE),
        torchvision_provider(inputs.dtype): torchvision_pool,
    }
    if mmcv := peer(PEERS["mmcv"]):
        pools["mmcv"] = lambda: mmcv.roi_pool(feature, rois, BINS, SCALE)
    outputs = len(rois) * C4.channels * BINS**2
    pixels = int(((boxes[:, 2:] - boxes[:, :2]) * SCALE + 1).prod(1).sum()) * C4.channels
    compare_passes(
        comparison,
        name,
        direction,
        pools,
        inputs,
        bytes=inputs.bytes(direction, outputs=outputs * (feature.itemsize + 4)),
        flops=pixels if direction == "forward" else outputs,
        **options,
    )


@pytest.mark.parametrize(
    ("dtype", "layout", "direction"),
    parameters(
        [(dtype, layout, direction) for dtype in DTYPES for layout in LAYOUTS for direction in DIRECTIONS],
        quick=lambda *row: row[:2] == ("float32", "channels_last"),
    ),
)
def bench_c4(comparison, dtype, layout, direction):
    name = f"{ROIS} RoIs 7x7, {dtype}, {layout}"
    compare_on_map(comparison, name, direction, objects(ROIS), dtype=dtype, layout=layout)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("boxes", ADVERSARIAL)
def bench_adversarial(comparison, boxes, direction):
    name = f"{ROIS} RoIs 7x7, {boxes}"
    compare_on_map(comparison, name, direction, ADVERSARIAL[boxes](ROIS), kind="adversarial")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rois", [10, 100, 1000, 4000])
def bench_rois(comparison, rois, direction):
    options: CaseOptions = {"kind": "scaling", "axis": f"RoIs, {direction}", "at": rois}
    compare_on_map(comparison, f"{rois:,} RoIs 7x7", direction, objects(rois), **options)
