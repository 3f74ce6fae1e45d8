"""RoIPool over the feature map of a C4 (He et al. 2017, §4.2, table 2c): 512 RoIs of 7 x 7.

Bytes: the pixels of the features that some RoI covers, read (forward), or the gradient of the features, written whole
(backward); the boxes; the outputs, and the position of each maximum (32 bits). FLOPs: a comparison for each pixel of
each RoI (forward), or an addition for each output (backward).
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import pytest
import torch
from torch import Tensor

import fastmask
from benchmarks import model_roi_pool
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.machine import PEERS, peer
from benchmarks.harness.operators import Call, Draw, Limit, Operator, meta
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
from tests.oracles.roi_align import check_large_map
from tests.oracles.roi_pool import assert_like_torchvision, draw_features_and_boxes

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
    """Compare pooling of `[K, 4]` boxes from the feature map of a C4; by default in the device's main dtype."""
    inputs = c4_inputs(comparison.device, boxes, dtype or comparison.main_dtype, layout)
    (feature,), (boxes,) = inputs.features, inputs.boxes
    rois = torch.nn.functional.pad(boxes, (1, 0))

    def torchvision_pool() -> Tensor:  # as under autocast, which does not know the operator on a CPU
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


def _calls(device: str, seed: int) -> list[Call]:
    features, boxes = draw_features_and_boxes(2, 5, 6, 7, boxes=3, seed=seed)
    features, boxes = features.to(device), boxes.to(device)
    last = features.to(memory_format=torch.channels_last, copy=True).requires_grad_()
    return [
        Call(fastmask.roi_pool, {"input": last, "boxes": boxes, "output_size": 2}),
        Call(fastmask.roi_pool, {"input": features, "boxes": [boxes[:, 1:]], "output_size": 2, "spatial_scale": 0.5}),
    ]


def _compile_case(dtype: str) -> Call:
    """Box pooling of a network without a pyramid, from its stride 16, for training."""
    feature = meta(1, 1024, 50, 84, dtype=DTYPES[dtype], channels_last=True).requires_grad_()
    arguments = {"input": feature, "boxes": meta(512, 5), "output_size": 7, "spatial_scale": 1 / 16}
    return Call(fastmask.roi_pool, arguments)


def _check_random(draw: Draw, device: str) -> None:
    """A random call and its gradient equal torchvision's, bit for bit."""
    shape = [draw.integer(1, most) for most in (2, 5, 9, 9)]
    count, size = draw.integer(0, 4), (draw.integer(1, 4), draw.integer(1, 4))
    scale, seed = draw.number(0.05, 4), draw.integer(0, 1 << 30)
    features, boxes = draw_features_and_boxes(*shape, boxes=count, seed=seed)
    features = (features * 2).round()  # ties
    boxes[:, 1:] /= scale
    assert_like_torchvision(device, features, boxes, size, scale)


OPERATOR = Operator(
    calls=_calls,
    compile_cases={
        f"512 RoIs 7x7, 1024 channels, {dtype}": partial(_compile_case, dtype) for dtype in ("bfloat16", "float32")
    },
    limits={
        "_roi_pool_backward_kernel": {"cuda": Limit(80, wide_stores=True), "hip": Limit(56, wide_stores=True)},
        "_roi_pool_kernel": {
            "cuda": Limit(112, wide_loads=True, wide_stores=True),
            "hip": Limit(56, wide_loads=True, wide_stores=True),
        },
    },
    check_random=_check_random,
    check_large=partial(check_large_map, fastmask.roi_pool),
    models=model_roi_pool.MODELS,
    targets=model_roi_pool.TARGETS,
)
