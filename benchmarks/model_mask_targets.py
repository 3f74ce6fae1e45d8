"""The static model of mask targets, and its workload: the positive samples of two images of the paper."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.operators import Launch, ModelTarget, Work
from benchmarks.harness.workloads import IMAGE, generator, objects

ROIS = 256  # 128 positive samples of each image (§3.1)
OBJECTS = 14  # seven an image, as in COCO
SIDE = 28
VERTICES = 30
SECTOR = 32  # bytes


def draw_polygons(count: int, vertices: int) -> list[list[list[float]]]:
    """Smooth star-shaped outlines in boxes of COCO's sizes, a polygon for each object."""
    random = np.random.default_rng(0)
    polygons = []
    for x1, y1, x2, y2 in objects(count).tolist():
        angle = np.sort(random.uniform(0, 2 * math.pi, vertices))
        first, second = random.uniform(0, 2 * math.pi, 2)
        radius = (0.75 + 0.15 * np.cos(3 * angle + first) + 0.1 * np.cos(8 * angle + second)) / 2
        x, y = (0.5 + radius * np.cos(angle)) * (x2 - x1) + x1, (0.5 + radius * np.sin(angle)) * (y2 - y1) + y1
        polygons.append([np.stack([x, y], 1).round(2).ravel().tolist()])
    return polygons


def draw_rois() -> tuple[Tensor, Tensor]:
    """`[ROIS, 4]` boxes near the objects, and the object of each."""
    matches = torch.arange(ROIS) % OBJECTS
    boxes = objects(OBJECTS)[matches]
    side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + torch.randn(ROIS, 4, generator=generator(1)) * 0.1 * side
    low, high = boxes.unflatten(1, (2, 2)).sort(1).values.unbind(1)
    limit = torch.tensor([IMAGE[1], IMAGE[0]])
    return torch.cat([low.clamp(min=0), high.minimum(limit)], 1), matches


def _polygons(launch: Launch) -> Work:
    a = launch.arguments
    rois, edges = len(a["boxes"]), a["EDGES"]
    written = rois * a["HEIGHT"] * a["WIDTH"] * 4
    read = rois * (16 + 8 + 40 + 16) + rois * VERTICES * 16
    return Work(
        hbm_bytes=written + rois * 24 + OBJECTS * (VERTICES * 16 + 56),
        l2_bytes=written + read * launch.programs / rois,
        trips={"part": 1.0, "edge": float(math.ceil(VERTICES / edges))},
    )


def _bitmaps(launch: Launch) -> Work:
    a = launch.arguments
    boxes, matches = draw_rois()
    side = boxes[:, 2:] - boxes[:, :2]
    grid = (side / torch.tensor([a["WIDTH"], a["HEIGHT"]])).ceil()  # samples of a bin
    steps = (grid[:, 0] / a["SAMPLES"]).ceil()
    columns, rows = float(steps.mean()), float((steps * grid[:, 1]).sum() / steps.sum())
    # A column of an object begins and ends one run; the search of a program visits those of its bins after the first.
    runs = torch.stack([2 * side[matches == index, 0].max() for index in range(OBJECTS)])[matches]
    search = float((runs.log2().floor() + 1).mean())
    programs, across = launch.programs / len(boxes), a["BINS"] * grid[:, 0]
    sampled = float((grid[:, 1] * (across + SECTOR)).sum()) * programs
    searched = float((across * 2 * 4 + search * SECTOR).sum()) * programs
    by_form = [form for form, used in (("RLE", a["WITH_RUNS"]), ("bitmaps", a["WITH_PIXELS"])) if used]
    share = {form: 1 / len(by_form) for form in by_form}
    trips: dict[str, float | tuple[float, ...]] = {
        "_sum_of_samples.i": (rows,) * len(by_form),
        "_sum_of_samples.j": (columns,) * len(by_form),
    }
    if "RLE" in share:
        trips["_runs_before.step"] = (search, 0.0)
    branches = {"if stepwise": 1.0} if "RLE" in share else {}
    if len(by_form) == 2:
        branches["if kind == RLE"] = share["RLE"]
    areas = torch.stack([side[matches == index].prod(1).max() for index in range(OBJECTS)])
    read = share.get("bitmaps", 0) * float(areas.sum()) + share.get("RLE", 0) * OBJECTS * 4 * float(runs.mean())
    written = len(boxes) * a["HEIGHT"] * a["WIDTH"] * 4
    return Work(
        hbm_bytes=written + len(boxes) * 24 + read,
        l2_bytes=written + share.get("bitmaps", 0) * sampled + share.get("RLE", 0) * searched,
        trips=trips,
        branches=branches,
        longest={
            "_sum_of_samples.i": (float(grid[:, 1].max()),) * len(by_form),
            "_sum_of_samples.j": (float(steps.max()),) * len(by_form),
        },
    )


MODELS = {"_polygon_targets_kernel": _polygons, "_bitmap_targets_kernel": _bitmaps}
TARGETS = tuple(
    ModelTarget(f"{ROIS} RoIs 28x28, {form}", (f"_{kernel}_targets_kernel",), microseconds)
    for form, kernel, microseconds in (("polygons", "polygon", 6), ("bitmaps", "bitmap", 40), ("RLE", "bitmap", 80))
)
