"""RoIPool and RoIWarp over the map of a C4 (He et al. 2017, §4.2, table 2c): 512 RoIs of 7 x 7.

Bytes: the pixels of the map that some RoI covers, read (forward), or the map's gradient, written whole (backward); the
boxes; the outputs, and for RoIPool where each maximum lies (32 bits). FLOPs: RoIAlign's for RoIWarp; for RoIPool a
comparison for each pixel of each RoI, and an addition for each output in its backward.
"""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

import fastmask
from benchmarks.harness.comparison import Race, parameters
from benchmarks.harness.machine import PEERS, peer
from benchmarks.harness.pooling import DIRECTIONS, DTYPES, LAYOUTS, Pool, race_passes, torchvision_in
from benchmarks.harness.workloads import ADVERSARIAL, C4, c4_map, covered, objects
from benchmarks.reporting.results import OURS

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
