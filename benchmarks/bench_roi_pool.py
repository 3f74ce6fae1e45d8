"""RoIPool over the feature map of a C4 (He et al. 2017, §4.2, table 2c), 512 RoIs of 7 x 7, and over P2 to P5.

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
from benchmarks.harness.operators import Backend, Call, Draw, Limit, Operator, meta
from benchmarks.harness.pooling import (
    DIRECTIONS,
    Direction,
    Inputs,
    Pool,
    c4_inputs,
    compare_passes,
    torchvision_ops,
    torchvision_provider,
)
from benchmarks.harness.workloads import ADVERSARIAL, C4, CHANNELS, DTYPES, LAYOUTS, STRIDES, objects, pyramid
from benchmarks.reporting.results import FASTMASK
from tests.oracles.roi_align import check_large_map
from tests.oracles.roi_pool import (
    assert_like_torchvision,
    assert_pyramid_like_torchvision,
    draw_features_and_boxes,
    draw_pyramid_and_boxes,
    pool_by_level,
)
from tests.oracles.roi_pool_variants import VARIANTS

BINS, ROIS, SCALE = 7, 512, 1 / C4.stride
SCALES = [1 / stride for stride in STRIDES]


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


@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_pyramid(comparison, direction):
    """P2 to P5 (table 6). torchvision has no RoIPool of a pyramid: a loop over levels, as its MultiScaleRoIAlign's."""
    dtype, rois = comparison.main_dtype, 1000
    features = pyramid(comparison.device, DTYPES[dtype], LAYOUTS["channels_last"])
    inputs = Inputs(features, [objects(rois).to(comparison.device)], STRIDES)
    boxes = torch.nn.functional.pad(inputs.boxes[0], (1, 0))

    def pool(feature: Tensor, boxes: Tensor, scale: float) -> Tensor:
        return torchvision_ops.roi_pool(feature.float(), boxes, BINS, scale).to(feature.dtype)

    pools: dict[str, Pool] = {
        FASTMASK: lambda: fastmask.multiscale_roi_pool(features, boxes, BINS, SCALES),
        torchvision_provider(dtype): lambda: pool_by_level(pool, features, boxes, SCALES),
    }
    outputs = rois * CHANNELS * BINS**2
    side = (boxes[:, 3:] - boxes[:, 1:3]) * _scales_of(boxes) + 1
    compare_passes(
        comparison,
        f"{rois} RoIs 7x7 from P2 to P5, {dtype}, channels_last",
        direction,
        pools,
        inputs,
        bytes=inputs.bytes(direction, outputs=outputs * (features[0].itemsize + 4)),
        flops=int(side.prod(1).sum()) * CHANNELS if direction == "forward" else outputs,
    )


def _scales_of(boxes: Tensor) -> Tensor:
    """The scale `[K, 1]` of each box's level (Lin et al. 2017, eq. 1)."""
    level = 4 + torch.log2((boxes[:, 3:] - boxes[:, 1:3]).prod(1, keepdim=True).sqrt() / 224)
    return 2.0 ** -level.floor().clamp(2, 5)


def _calls(device: str, seed: int) -> list[Call]:
    features, boxes = draw_features_and_boxes(2, 5, 6, 7, boxes=3, seed=seed)
    features, boxes = features.to(device), boxes.to(device)
    last = features.to(memory_format=torch.channels_last, copy=True).requires_grad_()
    levels, rois = draw_pyramid_and_boxes([(6, 7), (3, 4)], boxes=3, seed=seed)
    levels = [level.to(device, memory_format=torch.channels_last).requires_grad_() for level in levels]
    scales = [1 / 2, 1 / 4]
    on_pyramid = {"boxes": rois.to(device), "output_size": 2, "spatial_scales": scales, "canonical_box_size": 32}
    return [
        Call(fastmask.roi_pool, {"input": last, "boxes": boxes, "output_size": 2}),
        Call(fastmask.roi_pool, {"input": features, "boxes": [boxes[:, 1:]], "output_size": 2, "spatial_scale": 0.5}),
        Call(fastmask.multiscale_roi_pool, {"features": levels, **on_pyramid}),
    ]


def _compile_case(dtype: str) -> Call:
    """Box pooling of a network without a pyramid, from its stride 16, for training."""
    feature = meta(1, 1024, 50, 84, dtype=DTYPES[dtype], channels_last=True).requires_grad_()
    arguments = {"input": feature, "boxes": meta(512, 5), "output_size": 7, "spatial_scale": 1 / 16}
    return Call(fastmask.roi_pool, arguments)


def _compile_pyramid(dtype: str, *, channels: int = CHANNELS, channels_last: bool = True) -> Call:
    """Box pooling from P2 to P5 of two 800 x 1344 images, for training."""
    sizes = [(2, channels, 800 // stride, 1344 // stride) for stride in STRIDES]
    features = [meta(*size, dtype=DTYPES[dtype], channels_last=channels_last).requires_grad_() for size in sizes]
    arguments = {"features": features, "boxes": meta(1024, 5), "output_size": 7, "spatial_scales": SCALES}
    return Call(fastmask.multiscale_roi_pool, arguments)


def _check_random(draw: Draw, device: str) -> None:
    """A random call and its gradient equal torchvision's, bit for bit, on one map or on a pyramid."""
    if draw.integer(0, 3) == 0:
        sizes = [(draw.integer(1, 9), draw.integer(1, 9)) for _ in range(draw.integer(2, 3))]
        levels, rois = draw_pyramid_and_boxes(
            sizes, channels=3, boxes=draw.integer(0, 4), seed=draw.integer(0, 1 << 30)
        )
        scales = [2.0 ** -(level + 1) for level in range(len(sizes))]
        assert_pyramid_like_torchvision(device, levels, rois, (2, 2), scales, canonical_box_size=32)
        return
    shape = [draw.integer(1, most) for most in (2, 5, 9, 9)]
    count, size = draw.integer(0, 4), (draw.integer(1, 4), draw.integer(1, 4))
    scale, seed = draw.number(0.05, 4), draw.integer(0, 1 << 30)
    features, boxes = draw_features_and_boxes(*shape, boxes=count, seed=seed)
    features = (features * 2).round()  # ties
    boxes[:, 1:] /= scale
    assert_like_torchvision(device, features, boxes, size, scale)


LIMITS: dict[str, dict[Backend, Limit]] = {
    "_list_boxes_by_region_kernel": {"cuda": Limit(56, slow_paths=0), "hip": Limit(24)},
    "_roi_pool_backward_kernel": {
        "cuda": Limit(
            128,
            wide_loads=True,
            wide_stores=True,
            slow_paths=0,
            for_cases={
                "NCHW": Limit(256, wide_loads=True, slow_paths=0),
                "300 channels": Limit(128, slow_paths=0),
            },
        ),
        "hip": Limit(48, wide_stores=True, for_cases={"NCHW": Limit(56), "300 channels": Limit(48)}),
    },
    "_roi_pool_kernel": {
        # 32 programs of a warp share a multiprocessor.
        "cuda": Limit(
            64,
            wide_loads=True,
            wide_stores=True,
            slow_paths=0,
            occupancy=0.5,
            for_cases={"300 channels": Limit(64, slow_paths=0, occupancy=0.5)},
        ),
        "hip": Limit(40, wide_stores=True, for_cases={"300 channels": Limit(40)}),
    },
    "_round_boxes_kernel": {"cuda": Limit(32, slow_paths=0), "hip": Limit(32)},
}
OPERATOR = Operator(
    calls=_calls,
    compile_cases={
        f"{name}, {dtype}": partial(case, dtype)
        for name, case in (
            ("512 RoIs 7x7, 1024 channels", _compile_case),
            ("1024 RoIs 7x7, P2 to P5", _compile_pyramid),
        )
        for dtype in ("bfloat16", "float32")
    }
    | {
        "1024 RoIs 7x7, P2 to P5, NCHW, bfloat16": partial(_compile_pyramid, "bfloat16", channels_last=False),
        "1024 RoIs 7x7, P2 to P5, 300 channels, bfloat16": partial(_compile_pyramid, "bfloat16", channels=300),
    },
    limits=LIMITS,
    check_random=_check_random,
    check_large=partial(check_large_map, fastmask.roi_pool),
    variants=VARIANTS,
    models=model_roi_pool.MODELS,
    targets=model_roi_pool.TARGETS,
)
