"""The static model of RoIAlign's gradient: its lists of boxes, of windows and of segments, and its sums.

Tiles, windows of bins and segments are counted as `tile_lists.py` and `long_lists.py` form them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.operators import Launch, Work
from benchmarks.model_pooling import BOX_BYTES, CACHES, Group, bytes_that_move, groups, sizes_of, spec_of
from fastmask.kernels.roi_align.geometry import positions_along
from fastmask.kernels.roi_align.op import RoIAlignSpec
from fastmask.kernels.roi_align.tile_lists import TILE, WINDOW

SECTOR = 32


class _Axis:
    """Along one axis, the bins of a group's boxes that reach each tile: tensors `[tiles, K]`."""

    def __init__(self, start: Tensor, end: Tensor, extent: int, bins: int, spec: RoIAlignSpec) -> None:
        size = end - start if spec.aligned else (end - start).clamp(min=1)
        first = torch.arange(0, extent, TILE)[:, None]
        slack = 1 / 64 + (start.abs() + size.abs() + first) / (1 << 18)
        low, high = start.minimum(start + size), start.maximum(start + size)
        self.reached = (low - slack <= first + TILE) & (high + slack >= first - 1)
        half = 0.5 / spec.sampling_ratio if spec.sampling_ratio > 0 else 0.0
        bin = size / bins
        self.first_bin = (((first - 1 - slack - start) / bin - (1 - half)).floor() + 1).clamp(0, bins).long()
        end_bin = ((first + TILE + slack - start) / bin - half).ceil().clamp(0, bins).long()
        self.windows = ((end_bin - self.first_bin).clamp(min=0) + WINDOW - 1) // WINDOW
        self.reaching = (end_bin - self.first_bin).clamp(min=0)
        self.loaded = (self.first_bin + self.windows * WINDOW).clamp(max=bins) - self.first_bin
        self.visited = positions_along(start, end, bins, extent, spec).visited.view(-1, bins)  # [K, bins]

    def more_samples(self) -> Tensor:
        """Samples after the first of each window's bins, those of its largest bin, summed over windows."""
        total = torch.zeros_like(self.windows)
        padded = torch.nn.functional.pad(self.visited, (0, WINDOW))
        largest = padded.unfold(1, WINDOW, 1).amax(2)  # [K, bins + 1]: of the window that starts at each bin
        for index in range(int(self.windows.max()) if self.windows.numel() else 0):
            begin = (self.first_bin + index * WINDOW).clamp(max=largest.shape[1] - 1)
            samples = largest.expand(len(begin), -1, -1).gather(2, begin[:, :, None])[:, :, 0]
            total += torch.where(index < self.windows, (samples - 1).clamp(min=0), 0)
        return total


class _Tiles(NamedTuple):
    """The tiles of one level of one image, and its boxes."""

    y: _Axis
    x: _Axis
    reached: Tensor  # [rows of tiles, columns of tiles, K]

    def summed(self, of_y: Tensor, of_x: Tensor) -> Tensor:
        """The sum over boxes that reach a tile, `[rows, columns]`, of products of `[rows, K]` and `[columns, K]`."""
        return (self.reached * of_y[:, None] * of_x[None]).sum(2)


def _tiles_of(group: Group, spec: RoIAlignSpec) -> _Tiles:
    y = _Axis(group.start[:, 0], group.end[:, 0], group.height, spec.pooled_height, spec)
    x = _Axis(group.start[:, 1], group.end[:, 1], group.width, spec.pooled_width, spec)
    return _Tiles(y, x, y.reached[:, None] & x.reached[None])


@dataclass(frozen=True)
class _Windows:
    """The windows of all tiles together."""

    counts: Tensor  # [tiles] int64
    loaded: int  # bins, for the mean: all that are in a window
    reaching: int  # bins, for the maximum: those that reach the tile
    reaching_rows: int  # of bins, over all windows
    more_rows: float  # samples along y of the windows' bins, after the first of each
    more_columns: float

    @property
    def total(self) -> int:
        return int(self.counts.sum())


def _windows(launch: Launch) -> _Windows:
    counts, loaded, reaching, reaching_rows, more_rows, more_columns = [], 0, 0, 0, 0, 0
    for group in groups(launch):
        tiles = _tiles_of(group, spec_of(launch.arguments))
        counts.append(tiles.summed(tiles.y.windows, tiles.x.windows).flatten())
        loaded += int(tiles.summed(tiles.y.loaded, tiles.x.loaded).sum())
        reaching += int(tiles.summed(tiles.y.reaching, tiles.x.reaching).sum())
        reaching_rows += int(tiles.summed(tiles.y.reaching, tiles.x.windows).sum())
        more_rows += int(tiles.summed(tiles.y.more_samples(), tiles.x.windows).sum())
        more_columns += int(tiles.summed(tiles.y.windows, tiles.x.more_samples()).sum())
    return _Windows(torch.cat(counts), loaded, reaching, reaching_rows, more_rows, more_columns)


@dataclass(frozen=True)
class _Segments:
    """How long lists are split."""

    length: int  # windows of a segment; 0 if no list is long
    windows: list[int]  # of each segment
    split: Tensor  # [tiles]: whether a tile's list is

    @property
    def per_list(self) -> float:
        lists = int(self.split.sum())
        return len(self.windows) / lists if lists else 0.0


def _segments(counts: Tensor, limit: int, slots: int) -> _Segments:
    in_long_lists = int(counts[counts > limit].sum()) if slots else 0
    length = max(-(-2 * in_long_lists // slots), limit) if in_long_lists else 0
    split = (counts > length) if length else torch.zeros_like(counts, dtype=torch.bool)
    windows = [min(length, count - at) for count in counts[split].tolist() for at in range(0, count, length)]
    return _Segments(length, windows, split)


def _list_by_level(launch: Launch) -> Work:
    a = launch.arguments
    boxes, lists = a["num_boxes"] * BOX_BYTES, (a["num_boxes"] + launch.programs) * 4
    return Work(
        hbm_bytes=boxes + lists,
        l2_bytes=boxes * min(launch.programs, CACHES) + lists,  # a multiprocessor reads the boxes once
        trips={"start": float(-(-a["num_boxes"] // a["STEP"]))},
    )


def _list_windows(launch: Launch) -> Work:
    a = launch.arguments
    tiles, listed, steps, hits, rows, windows, total, most = 0, 0, 0, 0.0, 0.0, 0.0, 0, 0
    for group in groups(launch):
        of_group = _tiles_of(group, spec_of(a))
        boxes = of_group.reached.shape[2]
        padding = (0, -boxes % a["STEP"])
        reached = torch.nn.functional.pad(of_group.reached, padding).unflatten(2, (-1, a["STEP"]))
        down = torch.nn.functional.pad(of_group.y.windows, padding).unflatten(1, (-1, a["STEP"]))
        across = torch.nn.functional.pad(of_group.x.windows, padding).unflatten(1, (-1, a["STEP"]))
        down, across = (reached * down[:, None]).amax(3), (reached * across[None]).amax(3)  # of each step
        in_group = of_group.reached.shape[0] * of_group.reached.shape[1]
        tiles += in_group
        listed += in_group * boxes
        steps += in_group * reached.shape[2]
        most = max(most, reached.shape[2])
        hits += float(reached.any(3).sum())
        rows += float(down.sum())
        windows += float((down * across).sum())
        total += int(of_group.summed(of_group.y.windows, of_group.x.windows).sum())
    level_lists = a["num_images"] * len(sizes_of(launch))
    return Work(
        hbm_bytes=total * a["windows"].itemsize + tiles * (8 + 4) + len(a["boxes"]) * (BOX_BYTES + 4),
        l2_bytes=listed * (4 + BOX_BYTES) + total * a["windows"].itemsize + tiles * (8 + 4 + 4 * level_lists),
        trips={
            "first": (level_lists - 1) / level_lists,  # the first list has none before it
            "at": steps / tiles,
            "i": rows / hits,
            "j": windows / rows,
        },
        branches={"if tl.max(hit": hits / steps},
        longest={"at": float(most)},
    )


def _segment_sums(launch: Launch) -> Work:
    a = launch.arguments
    windows = _windows(launch)
    slots = launch.programs // -(-a["C"] // a["CHANNELS"])
    segments = _segments(windows.counts, a["SEGMENT"], slots)
    steps = -(-a["num_tiles"] // a["STEP"])
    looks = 2 if segments.length else 1
    trips = {"_segment_length.first": float(steps), "_find_segment.first": float(steps)}
    walked = sum(segments.windows) / max(len(segments.windows), 1)
    share = sum(segments.windows) / windows.total
    added = len(segments.windows) * TILE * TILE * a["C"] * a["workspace"].itemsize
    exists = len(segments.windows) / slots
    return Work(
        hbm_bytes=a["num_tiles"] * 4,
        l2_bytes=looks * launch.programs * a["num_tiles"] * 4 + share * _gradient_bytes(launch, windows) + added,
        trips=trips | _of_windows(launch, windows, walked),
        branches={
            "if in_segment > 0": float(segments.length > 0),
            "if count > 0": exists,
        },
    )


def _backward(launch: Launch) -> Work:
    a = launch.arguments
    windows = _windows(launch)
    slots = len(a["workspace"]) // (TILE * TILE * a["C"])
    segments = _segments(windows.counts, a["SEGMENT"], slots)
    here = windows.counts[~segments.split]
    trips = _of_windows(launch, windows, float(here.sum()) / max(len(here), 1))
    outputs = sum(output.nbytes for output in a["outputs"])
    grad = len(a["boxes"]) * a["PH"] * a["PW"] * a["C"] * _gradient_itemsize(launch)
    share = float(here.sum()) / windows.total
    added = len(segments.windows) * TILE * TILE * a["C"] * a["workspace"].itemsize
    return Work(
        hbm_bytes=bytes_that_move(launch, "backward", a["outputs"], grad),
        l2_bytes=share * _gradient_bytes(launch, windows) + added + launch.programs * SECTOR + outputs,
        trips={
            **trips,
            "first_pixel": TILE * TILE / a["PIXELS"],
            "sum_of_segments.index": segments.per_list,
        },
        branches={
            "if count > SEGMENT": float((windows.counts > a["SEGMENT"]).float().mean()),
            "if count <= walked": float((~segments.split).float().mean()),
        },
        longest={**trips, "sum_windows.at": float(here.max())},
    )


def _of_windows(launch: Launch, windows: _Windows, walked: float) -> dict[str, float | tuple[float, ...]]:
    """Trips of the loops over windows, and in them."""
    a = launch.arguments
    trips: dict[str, float | tuple[float, ...]] = {"sum_windows.at": walked}
    if a["REDUCTION"] == "max":
        trips["sum_windows.bin_p"] = windows.reaching_rows / windows.total
        trips["sum_windows.bin_q"] = windows.reaching / windows.reaching_rows
    elif a["RATIO"] == 0:
        trips["_axis_weights.i"] = windows.more_rows / windows.total, windows.more_columns / windows.total
    return trips


def _gradient_itemsize(launch: Launch) -> int:
    return launch.arguments["grad"].itemsize + (4 if launch.arguments["REDUCTION"] == "max" else 0)


def _gradient_bytes(launch: Launch, windows: _Windows) -> float:
    """Of the bins of all windows, and what each of a tile's programs reads of a window."""
    a = launch.arguments
    blocks = -(-a["C"] // a["CHANNELS"])
    per_window = a["windows"].itemsize + SECTOR
    bins = windows.reaching if a["REDUCTION"] == "max" else windows.loaded
    return bins * a["C"] * _gradient_itemsize(launch) + windows.total * blocks * per_window


MODELS = {
    "_list_boxes_by_level_kernel": _list_by_level,
    "list_windows_kernel": _list_windows,
    "segment_sums_kernel": _segment_sums,
    "_roi_align_backward_kernel": _backward,
}
