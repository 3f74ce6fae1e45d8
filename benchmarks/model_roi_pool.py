"""The static model of RoIPool: what its kernels do with the boxes of `harness/workloads.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.operators import Launch, ModelTarget, Work
from benchmarks.harness.workloads import C4
from benchmarks.model_pooling import BOX_BYTES, CACHES, SCALES, boxes_of, bytes_that_move, sizes_of, to_rois
from fastmask.kernels.roi_pool.geometry import bin_spans, levels_of_boxes, quantise
from fastmask.kernels.roi_pool.regions import WINDOW
from fastmask.kernels.roi_warp import RoundingSpec

WINDOW_BYTES = 4 * WINDOW
ARGMAX_BYTES = 4


class _Axis:
    """The rounded boxes of one level of one image along one axis of it."""

    def __init__(self, start: Tensor, size: Tensor, bins: int, extent: int) -> None:
        self.first, self.pixels = bin_spans(start, size, bins, extent, torch.float32)  # of each bin, [K, bins]
        self.begin, self.end = self.first[:, 0], (self.first + self.pixels)[:, -1]
        self.start, self.per_pixel, self.bins, self.extent = start, bins / size, bins, extent

    def reached(self, side: int) -> Tensor:
        """Whether a box reaches pixels t * side .. (t + 1) * side - 1, `[T, K]`."""
        first = torch.arange(0, self.extent, side)[:, None]
        return (self.begin < first + side) & (self.end > first) & (self.begin < self.end)

    def bins_visited(self, side: int) -> Tensor:
        """How many of a box's bins may hold such pixels, `[T, K]`."""
        first, slack = torch.arange(0, self.extent, side)[:, None], 1e-6 * self.bins
        low = ((first - self.start) * self.per_pixel - slack).floor().clamp(0, self.bins)
        high = ((first + side - self.start) * self.per_pixel + slack).ceil().clamp(0, self.bins)
        return (high - low).clamp(min=0)


class _Group(NamedTuple):
    y: _Axis
    x: _Axis


def _groups(launch: Launch) -> Iterator[_Group]:
    """Level by level and image by image."""
    a = launch.arguments
    images, sizes = a["num_images"], sizes_of(launch)
    rois = to_rois(boxes_of(images, len(a["boxes"] if "boxes" in a else a["windows"])))
    scales = SCALES if len(sizes) > 1 else [1 / C4.stride]
    levels = levels_of_boxes(rois, RoundingSpec(images, scales))
    # The kernel that lists boxes does not know the number of bins, and needs none.
    rows, columns = a.get("PH", 1), a.get("PW", 1)
    for level, ((height, width), scale) in enumerate(zip(sizes, scales, strict=True)):
        for image in range(images):
            x1, y1, across, down = quantise(rois[(levels == level) & (rois[:, 0] == image)], scale)
            yield _Group(_Axis(y1, down, rows, height), _Axis(x1, across, columns, width))


def _forward(launch: Launch) -> Work:
    a = launch.arguments
    count, bins = len(a["boxes"]), a["PH"] * a["PW"]
    row_bytes = a["C"] * a["features"][0].itemsize
    steps, most, pixels = 0.0, 0.0, 0
    for y, x in _groups(launch):
        of_bin = y.pixels[:, :, None] * x.pixels[:, None]
        of_row = (of_bin / a["UNROLL"]).ceil().sum(2)
        steps += float(of_row.sum())
        most = max(most, float(of_row.max()) if of_row.numel() else 0.0)
        pixels += int((y.pixels * (x.end - x.begin)[:, None]).sum())  # of a row of bins, those of two bins once
    outputs = count * bins * a["C"] * (a["features"][0].itemsize + ARGMAX_BYTES)
    moved = bytes_that_move(launch, "forward", a["features"], outputs)
    covered = moved - outputs - count * BOX_BYTES
    return Work(
        hbm_bytes=moved,
        l2_bytes=pixels * row_bytes + outputs + launch.programs * BOX_BYTES,
        trips={"q": float(a["PW"]), "_": steps / (count * bins)},
        longest={"_": most / a["PW"]},
        shared_bytes=covered,
        reread_bytes=pixels * row_bytes - covered,
    )


def _round(launch: Launch) -> Work:
    moved = launch.arguments["num_boxes"] * (BOX_BYTES + WINDOW_BYTES)
    return Work(hbm_bytes=moved, l2_bytes=moved)


def _list_by_region(launch: Launch) -> Work:
    a = launch.arguments
    listed = sum(
        int((y.reached(a["REGION"])[:, None] & x.reached(a["REGION"])[None]).sum()) for y, x in _groups(launch)
    )
    lists, windows = (listed + launch.programs) * 4, a["num_boxes"] * WINDOW_BYTES
    return Work(
        hbm_bytes=windows + lists,
        l2_bytes=windows * min(launch.programs, CACHES) + lists,  # a multiprocessor reads the windows once
        trips={"start": float(-(-a["num_boxes"] // a["STEP"]))},
    )


def _backward(launch: Launch) -> Work:
    a = launch.arguments
    outputs, sides = a["outputs"], (a["ROWS"], a["COLUMNS"])
    tiles, entries, visits, bins, steps, most, most_visits = 0, 0, 0, 0.0, 0.0, 0.0, 1.0
    for y, x in _groups(launch):
        in_region = y.reached(a["REGION"])[:, None] & x.reached(a["REGION"])[None]
        listed = in_region.sum(2).repeat_interleave(a["REGION"] // sides[0], 0)
        listed = listed.repeat_interleave(a["REGION"] // sides[1], 1)[
            : -(-y.extent // sides[0]), : -(-x.extent // sides[1])
        ]
        reached = y.reached(sides[0])[:, None] & x.reached(sides[1])[None]
        visited = y.bins_visited(sides[0])[:, None] * x.bins_visited(sides[1])[None] * reached
        of_tile = (visited / a["UNROLL"]).ceil().sum(2)
        tiles += listed.numel()
        entries += int(listed.sum())
        visits += int(reached.sum())
        bins += float(visited.sum())
        steps += float(of_tile.sum())
        if float(of_tile.max()) > most:
            most = float(of_tile.max())
            most_visits = float(reached.sum(2).flatten()[of_tile.argmax()])
    blocks = -(-a["C"] // a["CHANNELS"])
    row_bytes = a["C"] * (a["grad"].itemsize + ARGMAX_BYTES)
    gradients = len(a["windows"]) * a["PH"] * a["PW"] * row_bytes
    return Work(
        hbm_bytes=bytes_that_move(launch, "backward", outputs, gradients),
        l2_bytes=bins * row_bytes + blocks * (entries * (4 + WINDOW_BYTES)) + sum(output.nbytes for output in outputs),
        trips={"entry": entries / tiles, "first": steps / visits},
        branches={
            "if (top >= height)": 1 - tiles * blocks / launch.programs,
            "if (y_first < top": visits / entries,
        },
        longest={"entry": most_visits, "first": most / most_visits},  # entries that are visited
    )


MODELS = {
    "_list_boxes_by_region_kernel": _list_by_region,
    "_roi_pool_backward_kernel": _backward,
    "_roi_pool_kernel": _forward,
    "_round_boxes_kernel": _round,
}
BACKWARD = ("_round_boxes_kernel", "_list_boxes_by_region_kernel", "_roi_pool_backward_kernel")
ON_C4, ON_PYRAMID = "512 RoIs 7x7, 1024 channels, bfloat16", "1024 RoIs 7x7, P2 to P5, bfloat16"
TARGETS = tuple(
    ModelTarget(case, kernels, microseconds)
    for case, kernels, microseconds in (
        (ON_C4, ("_roi_pool_kernel",), 105),
        (ON_C4, BACKWARD, 155),
        (ON_PYRAMID, ("_roi_pool_kernel",), 65),
        (ON_PYRAMID, BACKWARD, 100),
    )
)
