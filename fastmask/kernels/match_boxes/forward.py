"""The kernels of `match_boxes`, and their launches.

1. `match_boxes_kernel`: a program matches a tile of boxes, and stores the highest IoU of its boxes with each object.
2. `label_best_kernel`, for the low-quality rule: a program finds the tiles that reach an object's highest IoU, computes
   their IoUs again, and stores label 1 for each box that reaches it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    ceil_div,
    divide,
    float64_bits,
    float_of,
    jit,
    on_device_of,
    tl,
)

if TYPE_CHECKING:
    from fastmask.kernels.match_boxes.op import MatchSpec

# Boxes in a tile, of one warp: two a thread, or one where tiles are too few to fill the device. Compiled for sm_90, two
# images of 268,569 anchors and 100 objects take by the static model: tiles of 64 boxes 17 us (57 registers; 12 objects
# touch a tile), of 128 boxes 26 us (78; 16), since the longest programs compare with all objects, of 32 boxes 21 us.
# Not yet measured on a GPU.
BLOCK, SMALL_BLOCK = 64, 32
SMALL = 1 << 16  # up to so many boxes in all images, tiles are small
GROUP = 32  # objects whose corners are in the registers of a warp
# Tiles whose highest IoUs `label_best_kernel` reads at a time: 53 registers. 512 to 4096, by one to four warps, take 0
# to 3 us more.
TILES = 1024


@jit()
def _load_boxes(boxes, index, inside):
    """Corners and area. A box without a positive finite area is all 0: it overlaps nothing, its IoU is 0 or NaN."""
    SIZE: tl.constexpr = index.shape[0]
    corners = tl.load(boxes + index[:, None] * 4 + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0.0)
    x, y = tl.split(tl.reshape(corners, (SIZE, 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    area = (x2 - x1) * (y2 - y1)
    usable = (area > 0) & (area < float("inf"))
    x1, y1, x2, y2 = (
        tl.where(usable, x1, 0.0),
        tl.where(usable, y1, 0.0),
        tl.where(usable, x2, 0.0),
        tl.where(usable, y2, 0.0),
    )
    return x1, y1, x2, y2, tl.where(usable, area, 0.0)


@jit()
def _intersection(a, b):
    """Areas of intersections; not positive where there is none, although only the width is clamped."""
    width = tl.maximum(tl.minimum(a[2], b[2]) - tl.maximum(a[0], b[0]), 0.0)
    return width * (tl.minimum(a[3], b[3]) - tl.maximum(a[1], b[1]))


@jit()
def _iou(a, b):
    """IoUs of boxes of which one has an area; not positive where they do not overlap."""
    intersection = _intersection(a, b)
    return divide(intersection, a[4] + b[4] - intersection)


@jit()
def _element(values, selected):
    """The selected one of a vector's elements, as a scalar: an integer sum is one instruction on NVIDIA's GPUs."""
    INTEGER: tl.constexpr = tl.int64 if values.dtype == tl.float64 else tl.int32
    return tl.sum(tl.where(selected, values.to(INTEGER, bitcast=True), 0), 0).to(values.dtype, bitcast=True)


@jit()
def _largest(values):
    """The largest element, if one is positive; else any that is not. Positive floats are ordered as integers."""
    INTEGER: tl.constexpr = tl.int64 if values.dtype == tl.float64 else tl.int32
    return tl.max(values.to(INTEGER, bitcast=True), 0).to(values.dtype, bitcast=True)


@jit()
def _box_of(boxes, selected):
    """The selected box of a vector of boxes."""
    x1, y1 = _element(boxes[0], selected), _element(boxes[1], selected)
    x2, y2 = _element(boxes[2], selected), _element(boxes[3], selected)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@jit()
def _bounds(box):
    return tl.min(box[0], 0), tl.min(box[1], 0), tl.max(box[2], 0), tl.max(box[3], 0)


@jit()
def _touching(boxes, bounds):
    """Which boxes have an area and touch the bounds."""
    touching = (boxes[0] < bounds[2]) & (boxes[2] > bounds[0]) & (boxes[1] < bounds[3]) & (boxes[3] > bounds[1])
    return touching & (boxes[4] > 0)


@jit()
def _first(selected, position, none):
    """The position of the first selected element; `none` where there is none."""
    return tl.min(tl.where(selected, position, none), 0)


@jit()
def _count(counts, image, size):
    """How many elements of an image take part: `counts[image]` in [0, size]."""
    count = size
    if counts is not None:
        count = tl.minimum(tl.maximum(tl.load(counts + image).to(tl.int64), 0), size).to(tl.int32)
    return count


@jit(do_not_specialize=["num_boxes", "num_gt", "num_crowds", "tiles", "high", "low", "overlap"])
def match_boxes_kernel(
    boxes,  # [N, 4] or [B, N, 4]
    gt_boxes,  # [B, G, 4]
    gt_counts,  # [B]
    counts,  # [B] or None: all boxes
    crowds,  # [B, C, 4] or None
    crowd_counts,  # [B] or None: all crowds
    matches,  # [B, N]
    labels,  # [B, N]
    highest,  # [B, G, tiles] or None
    num_boxes,
    num_gt,
    num_crowds,
    tiles,
    high,  # thresholds, as `float64_bits`
    low,
    overlap,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    COMPUTE: tl.constexpr = boxes.dtype.element_ty
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    index = tile * BLOCK + tl.arange(0, BLOCK)
    inside = index < _count(counts, image, num_boxes)
    if not SHARED:
        boxes += image * num_boxes * 4
    box = _load_boxes(boxes, index, inside)
    bounds = _bounds(box)
    num_objects = _count(gt_counts, image, num_gt)
    gt_boxes += image * num_gt * 4
    position = tl.arange(0, GROUP)

    best = tl.zeros((BLOCK,), COMPUTE)
    match = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_objects, GROUP):
        objects = _load_boxes(gt_boxes, first + position, first + position < num_objects)
        touching = _touching(objects, bounds)
        peak = tl.zeros((GROUP,), COMPUTE)
        current = _first(touching, position, GROUP)
        while current < GROUP:
            iou = _iou(box, _box_of(objects, position == current))
            better = iou > best  # strict: the first of equal ones stays
            best = tl.where(better, iou, best)
            match = tl.where(better, first + current, match)
            if highest is not None:
                peak = tl.where(position == current, _largest(iou), peak)
            current = _first(touching & (position > current), position, GROUP)
        if highest is not None:
            row = image * num_gt + first + position
            tl.store(highest + row * tiles + tile, peak, mask=first + position < num_objects)

    label = tl.where(best >= float_of(high, COMPUTE), 1, tl.where(best < float_of(low, COMPUTE), 0, -1))
    label = tl.where(num_objects > 0, label, 0)
    if crowds is not None:
        num_regions = _count(crowd_counts, image, num_crowds)
        if num_regions > 0:
            crowds += image * num_crowds * 4
            fraction = tl.zeros((BLOCK,), COMPUTE)
            for first in range(0, num_regions, GROUP):
                regions = _load_boxes(crowds, first + position, first + position < num_regions)
                touching = _touching(regions, bounds)
                current = _first(touching, position, GROUP)
                while current < GROUP:
                    intersection = _intersection(box, _box_of(regions, position == current))
                    inside_region = divide(intersection, tl.maximum(box[4], tl.full((), 1e-6, COMPUTE)))
                    fraction = tl.maximum(fraction, inside_region)
                    current = _first(touching & (position > current), position, GROUP)
            label = tl.where((label == 0) & (fraction >= float_of(overlap, COMPUTE)), -1, label)
    label = tl.where(inside, label, -1)
    output = image * num_boxes + index
    tl.store(matches + output, match.to(tl.int64), mask=index < num_boxes)
    tl.store(labels + output, label.to(tl.int8), mask=index < num_boxes)


@jit(do_not_specialize=["num_boxes", "num_gt", "tiles"])
def label_best_kernel(
    boxes,  # [N, 4] or [B, N, 4]
    gt_boxes,  # [B, G, 4]
    gt_counts,  # [B]
    counts,  # [B] or None: all boxes
    labels,  # [B, N]
    highest,  # [B, G, tiles]
    num_boxes,
    num_gt,
    tiles,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    COMPUTE: tl.constexpr = boxes.dtype.element_ty
    image = (tl.program_id(0) // num_gt).to(tl.int64)
    current = tl.program_id(0) % num_gt
    if current < _count(gt_counts, image, num_gt):
        highest += (image * num_gt + current) * tiles
        most = tl.zeros((TILES,), COMPUTE)
        for first in range(0, tiles, TILES):
            tile = first + tl.arange(0, TILES)
            most = tl.maximum(most, tl.load(highest + tile, mask=tile < tiles, other=0.0))
        peak = tl.max(most, 0)
        if peak > 0:
            corner = gt_boxes + (image * num_gt + current) * 4
            x1, y1, x2, y2 = tl.load(corner), tl.load(corner + 1), tl.load(corner + 2), tl.load(corner + 3)
            gt = (x1, y1, x2, y2, (x2 - x1) * (y2 - y1))
            if not SHARED:
                boxes += image * num_boxes * 4
            count = _count(counts, image, num_boxes)
            for first in range(0, tiles, TILES):
                tile = first + tl.arange(0, TILES)
                reaches = tl.load(highest + tile, mask=tile < tiles, other=0.0) == peak
                reached = _first(reaches, tile, tiles)
                while reached < tiles:
                    index = reached * BLOCK + tl.arange(0, BLOCK)
                    hit = _iou(_load_boxes(boxes, index, index < count), gt) == peak
                    # Boxes that are the best of several objects are stored several times, always as 1.
                    tl.store(labels + image * num_boxes + index, tl.full((BLOCK,), 1, tl.int8), mask=hit)
                    reached = _first(reaches & (tile > reached), tile, tiles)


class _Launches(NamedTuple):
    match: Launch
    label_best: Launch


@lru_cache(maxsize=256)
def _prepared(
    spec: MatchSpec, num_boxes: int, num_gt: int, num_crowds: int, shared: bool, block: int, most_tiles: int
) -> _Launches:
    tiles = ceil_div(num_boxes, block)
    return _Launches(
        Launch(
            match_boxes_kernel,
            num_boxes,
            num_gt,
            num_crowds,
            tiles,
            float64_bits(spec.high_threshold),
            float64_bits(spec.low_threshold),
            float64_bits(spec.crowd_overlap),
            SHARED=shared,
            BLOCK=block,
            GROUP=GROUP,
            num_warps=1,
            enable_fp_fusion=False,
        ),
        Launch(
            label_best_kernel,
            num_boxes,
            num_gt,
            tiles,
            SHARED=shared,
            BLOCK=block,
            TILES=most_tiles,
            num_warps=4,
            enable_fp_fusion=False,
        ),
    )


def launch_match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_counts: Tensor,
    counts: Tensor | None,
    crowds: Tensor | None,
    crowd_counts: Tensor | None,
    spec: MatchSpec,
) -> tuple[Tensor, Tensor]:
    (batch, num_gt, _), num_boxes = gt_boxes.shape, boxes.shape[-2]
    matches = torch.empty(batch, num_boxes, dtype=torch.int64, device=boxes.device)
    labels = torch.empty(batch, num_boxes, dtype=torch.int8, device=boxes.device)
    if not matches.numel():
        return matches, labels
    num_crowds = 0 if crowds is None else crowds.shape[1]
    block = BLOCK if matches.numel() > SMALL else SMALL_BLOCK
    tiles = ceil_div(num_boxes, block)
    launches = _prepared(spec, num_boxes, num_gt, num_crowds, boxes.ndim == 2, block, TILES)
    low_quality = spec.low_quality and num_gt > 0
    highest = torch.empty(batch, num_gt, tiles, dtype=boxes.dtype, device=boxes.device) if low_quality else None
    boxes, gt_boxes, gt_counts = boxes.contiguous(), gt_boxes.contiguous(), gt_counts.contiguous()
    counts = None if counts is None else counts.contiguous()
    crowds = None if crowds is None else crowds.contiguous()
    crowd_counts = None if crowd_counts is None else crowd_counts.contiguous()
    with on_device_of(boxes):
        launches.match(
            (batch * tiles,), boxes, gt_boxes, gt_counts, counts, crowds, crowd_counts, matches, labels, highest
        )
        if highest is not None:
            launches.label_best((batch * num_gt,), boxes, gt_boxes, gt_counts, counts, labels, highest)
    return matches, labels
