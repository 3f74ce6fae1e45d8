"""The static model of RoIAlign: what its forward and the gradient of its boxes do with the boxes of `workloads.py`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from benchmarks import model_roi_align_backward
from benchmarks.harness.operators import Backend, Launch, Limit, ModelTarget, Trips, Work
from benchmarks.model_pooling import BOX_BYTES, Sizes, bytes_that_move, rois_of, sizes_of, spec_of
from fastmask.kernels.roi_align.geometry import Level, positions_along, sample_boxes, select_boxes
from fastmask.kernels.roi_align.op import RoIAlignSpec

ARGMAX_BYTES = 4


def _forward(launch: Launch) -> Work:
    a = launch.arguments
    features, count, bins = a["features"], len(a["boxes"]), a["PH"] * a["PW"]
    row_bytes = a["C"] * features[0].itemsize
    outputs = count * bins * (row_bytes + (ARGMAX_BYTES * a["C"] if a["REDUCTION"] == "max" else 0))
    boxes = count * BOX_BYTES
    moved = bytes_that_move(launch, "forward", features, outputs)
    covered = moved - outputs - boxes
    sampled = _sampled(a["num_images"], count, sizes_of(launch), _key(spec_of(a)), a["BINS"] * a["tiles_per_program"])
    grid = _grids(a["num_images"], count, sizes_of(launch), _key(spec_of(a)), a["BINS"])
    channel_blocks = -(-a["C"] // (a["LINES"] * a["CHANNELS"]))
    tiles = -(-bins // a["BINS"])
    trips: dict[str, float | tuple[float, ...]] = {"tile": count * channel_blocks * tiles / launch.programs}
    longest: Trips = {}
    if a["RATIO"] == 0:
        trips |= _mean_grid(grid)
        longest = _largest_grid(grid)
    elif a["REDUCTION"] == "max":
        trips["i"] = float(a["RATIO"])
        if features[0].itemsize == 4:  # the compiler unrolls the columns of half precision
            trips["j"] = float(a["RATIO"])
    return Work(
        hbm_bytes=moved,
        l2_bytes=sampled * row_bytes + outputs + launch.programs * BOX_BYTES,
        trips=trips,
        longest=longest,
        shared_bytes=covered,
        reread_bytes=sampled * row_bytes - covered,
    )


def _box_backward(launch: Launch) -> Work:
    a = launch.arguments
    features, count, bins = a["features"], len(a["boxes"]), a["PH"] * a["PW"]
    row_bytes = a["C"] * features[0].itemsize
    read = count * bins * (row_bytes + (ARGMAX_BYTES * a["C"] if a["REDUCTION"] == "max" else 0))
    moved = bytes_that_move(launch, "forward", features, read + a["partial"].nbytes)
    covered = moved - read - a["partial"].nbytes - count * BOX_BYTES
    sampled = _sampled(a["num_images"], count, sizes_of(launch), _key(spec_of(a)), a["BINS"])
    grid = _grids(a["num_images"], count, sizes_of(launch), _key(spec_of(a)), a["BINS"])
    return Work(
        hbm_bytes=moved,
        l2_bytes=sampled * row_bytes + read + launch.programs * (BOX_BYTES + 32),
        trips=_mean_grid(grid),
        longest=_largest_grid(grid),
        shared_bytes=covered,
        reread_bytes=sampled * row_bytes - covered,
    )


def _key(spec: RoIAlignSpec) -> tuple:
    """The settings, hashable."""
    return tuple(tuple(value) if isinstance(value, list) else value for value in spec)


@lru_cache
def _sampled(images: int, count: int, sizes: Sizes, settings: tuple, bins: int) -> int:
    """Pixels that programs of `bins` bins of a box read, those of a program once, although several bins share them."""
    spec = RoIAlignSpec(*settings)
    spec = spec._replace(spatial_scales=list(spec.spatial_scales))
    rois = rois_of(images, count, spec)
    per_box, pixels = spec.pooled_height * spec.pooled_width, 0
    levels = zip(select_boxes(rois, images, spec), sizes, spec.spatial_scales, strict=True)
    for rows, (height, width), scale in levels:
        samples = sample_boxes(rois[rows], Level(images, height, width, scale, spec))
        program = samples.bin // per_box * -(-per_box // bins) + samples.bin % per_box // bins
        pixels += len((program[:, None] * (images * height * width) + samples.pixel).unique())
    return pixels


@lru_cache
def _grids(images: int, count: int, sizes: Sizes, settings: tuple, bins: int) -> Tensor:
    """Rows and columns of samples that a block of `bins` bins visits, those of its largest bin: `[blocks, 2]`."""
    spec = RoIAlignSpec(*settings)
    spec = spec._replace(spatial_scales=list(spec.spatial_scales))
    rois, grids = rois_of(images, count, spec), []
    pooled = (spec.pooled_height, spec.pooled_width)
    levels = zip(select_boxes(rois, images, spec), sizes, spec.spatial_scales, strict=True)
    for rows, (height, width), scale in levels:
        x1, y1, x2, y2 = (rois[rows, 1:] * scale - (0.5 if spec.aligned else 0.0)).unbind(1)
        down = positions_along(y1, y2, pooled[0], height, spec).visited.view(-1, pooled[0])
        across = positions_along(x1, x2, pooled[1], width, spec).visited.view(-1, pooled[1])
        bin = torch.arange(-(-pooled[0] * pooled[1] // bins) * bins).clamp(max=pooled[0] * pooled[1] - 1)
        visited = torch.stack([down[:, bin // pooled[1]], across[:, bin % pooled[1]]], 2)
        grids.append(visited.unflatten(1, (-1, bins)).amax(2).flatten(0, 1))
    return torch.cat(grids).float()


def _mean_grid(grid: Tensor) -> dict[str, float | tuple[float, ...]]:
    rows, columns = grid.unbind(1)
    return {"i": float(rows.mean()), "j": float((rows * columns).mean() / rows.mean())}


def _largest_grid(grid: Tensor) -> Trips:
    rows, columns = grid[grid.prod(1).argmax()].tolist()
    return {"i": rows, "j": columns}


# Adaptive grids divide by a box's number of samples: before all loops, but in the gradient of the features once for
# each window. An NCHW tensor is written in pieces of 4 bytes, and pixels of 300 bfloat16 channels begin anywhere.
LIMITS: dict[str, dict[Backend, Limit]] = {
    "_list_boxes_by_level_kernel": {"cuda": Limit(48, slow_paths=0), "hip": Limit(40)},
    # All programs of a training batch are resident at once.
    "list_windows_kernel": {"cuda": Limit(64, slow_paths=0, occupancy=0.5), "hip": Limit(40)},
    "segment_sums_kernel": {
        "cuda": Limit(
            224,
            wide_loads=True,
            wide_stores=True,
            slow_paths=0,
            for_cases={
                "detectron2, max": Limit(256, wide_stores=True, loop_slow_paths=4),
                "detectron2": Limit(224, wide_loads=True, wide_stores=True, loop_slow_paths=4),
                "max": Limit(256, wide_stores=True, slow_paths=0),
                "300 channels, bfloat16": Limit(80, wide_stores=True, slow_paths=0),
            },
        ),
        "hip": Limit(160, wide_loads=True, for_cases={"detectron2, max": Limit(176, wide_loads=True)}),
    },
    "_roi_align_backward_kernel": {
        "cuda": Limit(
            208,
            wide_loads=True,
            wide_stores=True,
            slow_paths=0,
            for_cases={
                "detectron2, max": Limit(256, wide_loads=True, wide_stores=True, loop_slow_paths=4),
                "detectron2": Limit(208, wide_loads=True, wide_stores=True, loop_slow_paths=4),
                "max": Limit(256, wide_loads=True, wide_stores=True, slow_paths=0),
                "NCHW": Limit(256, wide_loads=True, slow_paths=0),
                "300 channels, bfloat16": Limit(80, wide_loads=True, slow_paths=0),
            },
        ),
        "hip": Limit(192, wide_loads=True, for_cases={"max": Limit(192)}),
    },
    "_roi_align_box_backward_kernel": {
        "cuda": Limit(
            128,
            wide_loads=True,
            slow_paths=0,
            for_cases={"detectron2": Limit(128, wide_loads=True, loop_slow_paths=0)},
        ),
        "hip": Limit(80),
    },
    "_roi_align_forward_kernel": {
        "cuda": Limit(
            128,
            wide_loads=True,
            wide_stores=True,
            slow_paths=0,
            occupancy=0.25,  # 8 programs of a multiprocessor: see the constant `PROGRAMS`
            for_cases={
                "detectron2": Limit(144, wide_loads=True, wide_stores=True, loop_slow_paths=0),
                "NCHW": Limit(128, wide_loads=True, slow_paths=0, occupancy=0.25),
                "300 channels, bfloat16": Limit(136, slow_paths=0),
            },
        ),
        "hip": Limit(
            176,
            wide_loads=True,
            wide_stores=True,
            for_cases={
                "NCHW": Limit(200, wide_loads=True),
                "300 channels, bfloat16": Limit(184),
                "300 channels": Limit(312, wide_loads=True, wide_stores=True),
            },
        ),
    },
}

MODELS = {
    "_roi_align_box_backward_kernel": _box_backward,
    "_roi_align_forward_kernel": _forward,
    **model_roi_align_backward.MODELS,
}
FORWARD = ("_roi_align_forward_kernel",)
BACKWARD = tuple(model_roi_align_backward.MODELS)
TARGETS = (
    ModelTarget("1000 RoIs 7x7, torchvision, bfloat16", FORWARD, 45),
    ModelTarget("1000 RoIs 7x7, detectron2, bfloat16", FORWARD, 90),
    ModelTarget("100 RoIs 14x14, torchvision, bfloat16", FORWARD, 20),
    ModelTarget("1024 RoIs 7x7, torchvision, bfloat16", BACKWARD, 80),
)
