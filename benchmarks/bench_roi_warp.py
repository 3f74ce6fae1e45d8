"""RoIWarp over the feature map of a C4 (He et al. 2017, §4.2, table 2c), 512 RoIs of 7 x 7, and over P2 to P5.

Bytes and FLOPs are RoIAlign's. K RoIs, C channels, P bins along an axis, S samples along an axis of a bin. Bytes: the
pixels of the features that some RoI covers, read (forward), or the gradient of the features, written whole (backward);
the boxes; K * C * P^2 outputs. FLOPs: a multiply-add for each of the four neighbours of K * C * (P * S)^2 samples.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastmask
from benchmarks import model_roi_align
from benchmarks.harness.checks import parameters
from benchmarks.harness.operators import Call, Draw, Operator, meta
from benchmarks.harness.pooling import (
    DIRECTIONS,
    Inputs,
    Pool,
    c4_inputs,
    compare_passes,
    torchvision_ops,
    torchvision_provider,
)
from benchmarks.harness.workloads import C4, CHANNELS, DTYPES, LAYOUTS, STRIDES, objects, pyramid
from benchmarks.reporting.results import FASTMASK
from tests.oracles.roi_align import draw_boxes, draw_pyramid
from tests.oracles.roi_pool import pool_by_level, warped_boxes
from tests.oracles.roi_warp_variants import VARIANTS

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
    rounded = _round(rois, SCALE)
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


@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_pyramid(comparison, direction):
    """P2 to P5, as in table 6; torchvision pools boxes that are rounded on their level, in a loop over levels."""
    dtype, rois = comparison.main_dtype, 1000
    features = pyramid(comparison.device, DTYPES[dtype], LAYOUTS["channels_last"])
    inputs = Inputs(features, [objects(rois).to(comparison.device)], STRIDES)
    boxes = torch.nn.functional.pad(inputs.boxes[0], (1, 0))
    scales = [1 / stride for stride in STRIDES]

    def pool(feature: Tensor, boxes: Tensor, scale: float) -> Tensor:
        return torchvision_ops.roi_align(feature, _round(boxes, scale), BINS, 1.0, SAMPLES)

    pools: dict[str, Pool] = {
        FASTMASK: lambda: fastmask.multiscale_roi_warp(features, boxes, BINS, scales, SAMPLES),
        torchvision_provider(dtype): lambda: pool_by_level(pool, features, boxes, scales),
    }
    outputs = rois * CHANNELS * BINS**2
    compare_passes(
        comparison,
        f"{rois} RoIs 7x7 from P2 to P5, {dtype}, channels_last",
        direction,
        pools,
        inputs,
        bytes=inputs.bytes(direction, outputs=outputs * features[0].itemsize),
        flops=outputs * SAMPLES**2 * 4 * 2,
    )


def _round(rois: Tensor, scale: float) -> Tensor:
    """Boxes `[K, 5]` in whole pixels of the feature map, far edges included."""
    low, high = (rois[:, 1:].unflatten(1, (2, 2)) * scale).round().unbind(1)
    return torch.cat([rois[:, :1], low, high.maximum(low) + 1], 1)


def _calls(device: str, seed: int) -> list[Call]:
    (feature,) = draw_pyramid([(6, 7)], seed=seed, layout=torch.channels_last)
    feature, boxes = feature.to(device).requires_grad_(), draw_boxes(3, 2, 24, seed).to(device)
    arguments = {"input": feature, "boxes": boxes, "output_size": 2, "spatial_scale": 0.25, "sampling_ratio": 2}
    levels = draw_pyramid([(6, 7), (3, 4)], seed=seed, layout=torch.channels_last)
    levels = [level.to(device).requires_grad_() for level in levels]
    on_pyramid = {"boxes": boxes, "output_size": 2, "spatial_scales": [1 / 2, 1 / 4], "canonical_box_size": 32}
    return [
        Call(fastmask.roi_warp, arguments),
        Call(fastmask.roi_warp, {**arguments, "reduction": "max"}),
        Call(fastmask.multiscale_roi_warp, {"features": levels, **on_pyramid}),
    ]


def _compile_pyramid() -> Call:
    """Box pooling from P2 to P5 of two 800 x 1344 images, for training: boxes name their level."""
    features = [
        meta(2, CHANNELS, 800 // stride, 1344 // stride, dtype=torch.bfloat16, channels_last=True).requires_grad_()
        for stride in STRIDES
    ]
    scales = [1 / stride for stride in STRIDES]
    arguments = {"features": features, "boxes": meta(1024, 5), "output_size": 7, "spatial_scales": scales}
    return Call(fastmask.multiscale_roi_warp, arguments)


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


# RoIWarp launches the kernels of RoIAlign, whose declaration has their limits and most of their compile cases.
OPERATOR = Operator(
    calls=_calls,
    compile_cases={"1024 RoIs 7x7, RoIWarp, P2 to P5, bfloat16": _compile_pyramid},
    limits={},
    check_random=_check_random,
    variants=VARIANTS,
    models=model_roi_align.MODELS,
)
