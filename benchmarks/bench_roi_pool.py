"""RoIPool and RoIWarp over the map of a C4 (He et al. 2017, §4.2, table 2c): 512 RoIs of 7 x 7.

Bytes: the pixels of the map that some RoI covers, read (forward), or the map's gradient, written whole (backward); the
boxes; the outputs, and for RoIPool where each maximum lies (32 bits). FLOPs: RoIAlign's for RoIWarp; for RoIPool a
comparison for each pixel of each RoI, and an addition for each output in its backward.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor

import fastmask
from benchmarks.harness.comparison import Race, parameters
from benchmarks.harness.machine import PEERS, peer
from benchmarks.harness.operators import Call, Draw, Limit, Operator, meta
from benchmarks.harness.pooling import DIRECTIONS, DTYPES, LAYOUTS, Pool, race_passes, torchvision_in
from benchmarks.harness.workloads import ADVERSARIAL, C4, c4_map, covered, objects
from benchmarks.reporting.results import OURS
from tests.oracles.roi_align import check_large_map
from tests.oracles.roi_pool import assert_like_torchvision, draw_features_and_boxes

BINS, ROIS, SCALE = 7, 512, 1 / C4.stride
SAMPLES = 2


def race_on_map(
    race: Race,
    operator: str,
    direction: str,
    boxes: Tensor,
    name: str,
    *,
    dtype: str | None = None,
    layout: str = "channels_last",
    **options: object,
) -> None:
    dtype = dtype or race.main_dtype
    feature = c4_map(race.device, DTYPES[dtype], LAYOUTS[layout])
    boxes = boxes.to(race.device)
    rows = torch.nn.functional.pad(boxes, (1, 0))
    makers = {"RoIPool": _roi_pool, "RoIWarp": _roi_warp}
    pools = makers[operator](feature, rows, dtype)

    size, outputs = feature.itemsize, len(rows) * C4.channels * BINS**2
    others = boxes.nbytes + outputs * (size + 4 * (operator == "RoIPool"))
    read = covered([boxes], [feature.shape[2:]], [C4.stride]) * C4.channels * size
    pixels = int(((boxes[:, 2:] - boxes[:, :2]) * SCALE + 1).prod(1).sum()) * C4.channels
    flops = {"RoIPool": pixels if direction == "forward" else outputs, "RoIWarp": outputs * SAMPLES**2 * 4 * 2}
    race_passes(
        race,
        f"{operator}, {direction}, {name}",
        direction,
        pools,
        [feature],
        bytes=others + (read if direction == "forward" else feature.nbytes),
        flops=flops[operator],
        **options,
    )


def _roi_pool(feature: Tensor, rows: Tensor, dtype: str) -> dict[str, Pool]:
    def theirs() -> Tensor:  # autocast's casts by hand: on a CPU it does not know the operator
        return torchvision.ops.roi_pool(feature.float(), rows, BINS, SCALE).to(feature.dtype)

    pools: dict[str, Pool] = {
        OURS: lambda: fastmask.roi_pool(feature, rows, BINS, SCALE),
        torchvision_in(dtype): theirs,
    }
    if mmcv := peer(PEERS["mmcv"]):
        pools["mmcv"] = lambda: mmcv.roi_pool(feature, rows, BINS, SCALE)
    return pools


def _roi_warp(feature: Tensor, rows: Tensor, dtype: str) -> dict[str, Pool]:
    """torchvision has none, but its RoIAlign of boxes on whole pixels is one: an upper right edge is part of a box."""
    low, high = (rows[:, 1:].unflatten(1, (2, 2)) * SCALE).round().unbind(1)
    rounded = torch.cat([rows[:, :1], low, high.maximum(low) + 1], 1)
    return {
        OURS: lambda: fastmask.roi_warp(feature, rows, BINS, SCALE, SAMPLES),
        torchvision_in(dtype): lambda: torchvision.ops.roi_align(feature, rounded, BINS, 1.0, SAMPLES),
    }


@pytest.mark.parametrize(
    ("operator", "dtype", "layout", "direction"),
    parameters(
        [
            *(
                ("RoIPool", dtype, layout, direction)
                for dtype in DTYPES
                for layout in LAYOUTS
                for direction in DIRECTIONS
            ),
            *(("RoIWarp", dtype, "channels_last", direction) for dtype in DTYPES for direction in DIRECTIONS),
        ],
        quick=lambda *row: row[1:3] == ("float32", "channels_last"),
    ),
)
def bench_c4(race, operator, dtype, layout, direction):
    name = f"{ROIS} RoIs 7x7, {dtype}, {layout}"
    race_on_map(race, operator, direction, objects(ROIS), name, dtype=dtype, layout=layout)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("boxes", ADVERSARIAL)
def bench_adversarial(race, boxes, direction):
    race_on_map(race, "RoIPool", direction, ADVERSARIAL[boxes](ROIS), f"{ROIS} RoIs 7x7, {boxes}", kind="adversarial")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rois", [10, 100, 1000, 4000])
def bench_rois(race, rois, direction):
    options = {"kind": "scaling", "axis": f"RoIs, {direction}", "at": rois}
    race_on_map(race, "RoIPool", direction, objects(rois), f"{rois:,} RoIs 7x7", **options)


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
    """A random call and its gradient are torchvision's, bit for bit."""
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
)
