"""Matching in plain torch: the reference, and what runs on the CPU.

Boxes are cut into tiles. A tile is compared with the objects that touch its bounding box, and tiles with many of them
come first: step r compares the tiles that have more than r objects with their r-th one, in a few operations on large
tensors. Where few tiles are left, several steps are taken at once. IoUs are those of torchvision's `box_iou`, to the
bit: the same operations on the same floats.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastmask.kernels.match_boxes.op import MatchSpec

TILE = 256  # boxes
PAIRS = 1 << 15  # of a box and an object, in an operation: its operands stay in cache
FEW_PAIRS = 1 << 19  # up to which all pairs are compared at once: finding the tiles that touch would take longer


class _Boxes(NamedTuple):
    """K boxes. Those without a positive finite area are all 0: they overlap nothing, since their IoU is 0 or NaN."""

    extent: Tensor  # [4, K]: -x1, -y1, x2, y2; the minimum of two of them is the extent of the intersection
    area: Tensor  # [K]

    @classmethod
    def of(cls, boxes: Tensor, size: int) -> _Boxes:
        """Boxes `[K, 4]`, and zeros up to `size`."""
        extent = boxes.new_zeros(4, size)
        extent[:, : len(boxes)] = boxes.t()
        low, high = extent.chunk(2)
        width, height = high + low.neg_()
        area = width.mul_(height)
        unusable = ~((area > 0) & (area < math.inf))
        return cls(extent.masked_fill_(unusable, 0), area.masked_fill_(unusable, 0))


class _Tiles(NamedTuple):
    """M tiles of T boxes."""

    extent: Tensor  # [4, M, T]
    area: Tensor  # [M, T]
    bounds: Tensor  # [4, M]: the extent of each tile

    @classmethod
    def of(cls, boxes: Tensor) -> _Tiles:
        """The tiles of boxes `[N, 4]`."""
        count = -(-len(boxes) // TILE)
        boxes_ = _Boxes.of(boxes, count * TILE)
        extent = boxes_.extent.view(4, count, TILE)
        return cls(extent, boxes_.area.view(count, TILE), extent.amax(2))

    def touched_by(self, regions: _Boxes) -> Tensor:
        """Which of K regions touch each tile, boolean `[M, K]`. The others overlap none of its boxes."""
        opposite = self.bounds.roll(2, 0)
        return (opposite[:, :, None] > -regions.extent[:, None, :]).all(0) & (regions.area > 0)


class _Best(NamedTuple):
    """The best object of each box, and which boxes are the best of an object."""

    iou: Tensor  # [M, T]
    object: Tensor  # [M, T] int64, 0 where the IoU is 0
    is_best: Tensor  # [M, T] boolean


def _intersection(extent: Tensor, other: Tensor) -> Tensor:
    """Areas of intersections; not positive where there is none, although only the width is clamped."""
    low, high = torch.minimum(extent, other).chunk(2)
    width, height = low.add_(high)
    return width.clamp_(min=0).mul_(height)


def _iou(extent: Tensor, area: Tensor, other: Tensor, other_area: Tensor) -> Tensor:
    """IoUs; not positive where boxes do not overlap."""
    intersection = _intersection(extent, other)
    return intersection.div_((area + other_area).sub_(intersection))


def _find_best(tiles: _Tiles, objects: Tensor, low_quality: bool) -> _Best:
    """Compare the boxes with objects `[G, 4]`; `is_best` is found only with `low_quality`."""
    if len(objects) and len(objects) * tiles.area.numel() <= FEW_PAIRS:
        return _best_of_all_pairs(tiles, objects, low_quality)
    extent, area, _ = tiles
    iou, is_best = torch.zeros_like(area), torch.zeros_like(area, dtype=torch.bool)
    match = torch.zeros_like(area, dtype=torch.int64)
    none = len(objects)  # fills up lists of objects
    gt = _Boxes.of(objects, none + 1)
    touched = tiles.touched_by(gt)
    count, order = touched.sum(1).sort(descending=True, stable=True)
    steps = int(count[0])
    if not steps:
        return _Best(iou, match, is_best)
    gt = gt._replace(area=gt.area.masked_fill(gt.area == 0, 1))  # so that no union is 0
    extent, area = extent[:, order], area[order]
    row, index = touched[order].nonzero(as_tuple=True)
    step = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    listed = order.new_full((steps, len(order)), none)  # objects of each tile, in ascending order
    listed[step, row] = index
    sizes = (count > torch.arange(steps, device=count.device)[:, None]).sum(1).tolist()

    highest = area.new_zeros(steps, len(order))  # IoU of each tile's boxes with its objects
    first = 0
    while first < steps:
        size = sizes[first]
        last = min(steps, first + max(1, PAIRS // (size * TILE)))
        for begin in range(0, size, PAIRS // TILE):
            rows = slice(begin, min(size, begin + PAIRS // TILE))
            objects_ = listed[first:last, rows]
            value = _iou(extent[:, None, rows], area[rows], gt.extent[:, objects_, None], gt.area[objects_, None])
            best, best_step = iou[rows], match[rows]
            for step, one in enumerate(value, first):
                best_step.masked_fill_(one > best, step)
                torch.maximum(best, one, out=best)
            if low_quality:
                highest[first:last, rows] = value.amax(2)
        first = last
    match = listed.t().gather(1, match).masked_fill_(iou == 0, 0)

    if low_quality:
        peak = gt.area.new_zeros(none + 1).scatter_reduce_(0, listed.flatten(), highest.flatten(), "amax")
        pairs = ((highest == peak[listed]) & (highest > 0)).nonzero()
        for step, row in (part.unbind(1) for part in pairs.split(PAIRS // TILE)):
            objects_ = listed[step, row]
            value = _iou(extent[:, row], area[row], gt.extent[:, objects_, None], gt.area[objects_, None])
            pair, column = (value == peak[objects_, None]).nonzero(as_tuple=True)
            is_best[row[pair], column] = True
    place = order.argsort()
    return _Best(iou[place], match[place], is_best[place])


def _best_of_all_pairs(tiles: _Tiles, objects: Tensor, low_quality: bool) -> _Best:
    """As `_find_best`, from the matrix of IoUs."""
    gt = _Boxes.of(objects, len(objects))
    gt_area = gt.area.masked_fill(gt.area == 0, 1)  # so that no union is 0
    value = _iou(tiles.extent[:, None], tiles.area, gt.extent[:, :, None, None], gt_area[:, None, None])  # [G, M, T]
    iou, match = value.max(0)
    iou.clamp_(min=0)
    is_best = torch.zeros_like(iou, dtype=torch.bool)
    if low_quality:
        peak = value.amax((1, 2), keepdim=True)
        is_best = ((value == peak) & (peak > 0)).any(0)
    return _Best(iou, match.masked_fill_(iou == 0, 0), is_best)


def _in_crowd(tiles: _Tiles, crowds: Tensor, overlap: float) -> Tensor:
    """Which boxes have at least the fraction `overlap` of their area in one of the regions `[C, 4]`; `[M, T]`."""
    regions = _Boxes.of(crowds, len(crowds))
    inside = torch.full_like(tiles.area, bool(len(crowds)) and overlap <= 0, dtype=torch.bool)
    pairs = tiles.touched_by(regions).nonzero()
    for row, region in (part.unbind(1) for part in pairs.split(PAIRS // TILE)):
        intersection = _intersection(tiles.extent[:, row], regions.extent[:, region, None])
        pair, column = (intersection / tiles.area[row].clamp(min=1e-6) >= overlap).nonzero(as_tuple=True)
        inside[row[pair], column] = True
    return inside


def _clamped(counts: Tensor | None, batch: int, size: int) -> list[int]:
    """The counts of a batch, in [0, size]."""
    return [size] * batch if counts is None else [min(max(count, 0), size) for count in counts.tolist()]


def match_boxes_reference(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_counts: Tensor,
    counts: Tensor | None,
    crowds: Tensor | None,
    crowd_counts: Tensor | None,
    spec: MatchSpec,
) -> tuple[Tensor, Tensor]:
    """Image by image."""
    (batch, num_gt, _), num_boxes = gt_boxes.shape, boxes.shape[-2]
    matches = boxes.new_zeros(batch, num_boxes, dtype=torch.int64)
    labels = boxes.new_full((batch, num_boxes), -1, dtype=torch.int8)
    tiles = _Tiles.of(boxes) if boxes.dim() == 2 and num_boxes else None
    num_crowds = 0 if crowds is None else crowds.shape[1]
    sizes = zip(
        _clamped(counts, batch, num_boxes),
        _clamped(gt_counts, batch, num_gt),
        _clamped(crowd_counts, batch, num_crowds),
        strict=True,
    )
    for image, (count, objects, regions) in enumerate(sizes):
        if not count:
            continue
        of_image = tiles or _Tiles.of(boxes[image, :count])
        best = _find_best(of_image, gt_boxes[image, :objects], spec.low_quality)
        high, low = best.iou >= spec.high_threshold, best.iou >= spec.low_threshold
        label = 2 * high.to(torch.int8) - low.to(torch.int8)
        label = label.masked_fill_(best.is_best, 1) if objects else label.zero_()
        if crowds is not None and regions:
            label.masked_fill_(_in_crowd(of_image, crowds[image, :regions], spec.crowd_overlap) & (label == 0), -1)
        matches[image, :count] = best.object.flatten()[:count]
        labels[image, :count] = label.flatten()[:count]
    return matches, labels
