"""Where RoIAlign samples: the geometry that its reference, its forward and its backward share.

Along each axis, for a box [start, end] scaled to its level, P bins and g samples per bin,

    size = end - start          (at least 1 unless aligned)          bin = size / P
    g = sampling_ratio, or ceil(bin) where that is not positive
    position(p, i) = start + p * bin + (i + 1/2) * bin / g

and the feature at a position is interpolated between its two neighbours. Positions are in feature pixels
whose centres are the integers; `aligned` shifts boxes by -1/2 so that continuous image coordinates (pixel
j covers [j, j + 1)) fall on those centres. A sample in [-1, 0] or [H - 1, H] takes the border's value, one
beyond contributes 0. The operations are torchvision's, in its order and without fused multiply-adds, so that
the same samples are inside and outside.

An adaptive grid visits only the samples that can be inside, and a few more: all others contribute 0, and a
box of a billion pixels would otherwise take hours.

A box is *pooled* unless a side is infinite or NaN before or after scaling, its image is not in the batch, it has no
level, or the level has no pixels. A box that is not pooled has zero features and contributes no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._rois import image_indices
from fastmask.kernels._runtime import divide, divide_by_constant, divide_by_reciprocal, float_of, jit, tl
from fastmask.kernels.roi_align.levels import EXPLICIT, assign_fpn_levels

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import RoIAlignSpec

# The reference lists at most about this many samples at a time, of about 100 bytes each.
MAX_SAMPLES = 1 << 21
# Samples visited beyond the first and the last that can be inside: more than rounding can shift.
_MARGIN = 2


class Level(NamedTuple):
    """One level of the pyramid, and how it is pooled."""

    num_images: int
    height: int
    width: int
    scale: float
    spec: RoIAlignSpec


class Samples(NamedTuple):
    """Every sample of S samples in K x PH x PW bins of one level, in bin order, row-major within a bin."""

    pixel: Tensor  # [S, 4] rows of the level's [N * H * W, C] table, int32 where they fit
    weight: Tensor  # [S, 4] bilinear weights, for the mean divided by the bin's number of samples
    bin: Tensor  # [S] the bin that each belongs to
    first: Tensor  # [K * PH * PW + 1] the first sample of each bin, and S


class AxisPositions(NamedTuple):
    """Where the samples along one axis of all boxes lie, bin by bin; A of them in K * P bins."""

    position: Tensor  # [A] in pixels of the level, before they are clamped to it
    number: Tensor  # [A] i + 1/2 for sample i of its bin
    grid: Tensor  # [A] number of samples of its bin
    bin: Tensor  # [A] the bin that each belongs to
    first: Tensor  # [K * P] the first sample of each bin
    visited: Tensor  # [K * P] its number of samples that are visited


class AxisSamples(NamedTuple):
    """The samples along one axis of all boxes, as `AxisPositions` orders them."""

    neighbours: Tensor  # [A, 2] low and high
    weights: Tensor  # [A, 2]
    first: Tensor  # [K * P]
    visited: Tensor  # [K * P]


def select_boxes(boxes: Tensor, num_images: int, spec: RoIAlignSpec) -> list[Tensor]:
    """The rows of `boxes [K, 5]` that are pooled from each level."""
    levels = len(spec.spatial_scales)
    side = boxes[:, 3:] - boxes[:, 1:3]
    if spec.level_rounding == EXPLICIT:
        level = image_indices(boxes, num_images * levels) % levels
    else:
        image_indices(boxes, num_images)  # raises if one is not in the batch
        level = assign_fpn_levels(boxes[:, 1:], spec.spatial_scales, spec.rule)
    level = level.where(side.isfinite().all(1), -1)
    finite = [(boxes[:, 3:] * scale - boxes[:, 1:3] * scale).isfinite().all(1) for scale in spec.spatial_scales]
    return [((level == index) & is_finite).nonzero()[:, 0] for index, is_finite in enumerate(finite)]


def positions_along(start: Tensor, end: Tensor, bins: int, extent: int, spec: RoIAlignSpec) -> AxisPositions:
    """The samples along one axis of boxes from `start` to `end`, on a level of `extent` pixels."""
    ratio = spec.sampling_ratio
    size = end - start if spec.aligned else (end - start).clamp(min=1)
    bin = size[:, None] / bins
    grid = torch.full_like(bin, ratio) if ratio > 0 else bin.ceil().clamp(min=0)
    base = start[:, None] + torch.arange(bins, dtype=bin.dtype, device=bin.device) * bin
    if ratio > 0:
        skipped, visited = torch.zeros_like(base), torch.full_like(base, ratio)
    else:
        step, zero = bin / grid, torch.zeros_like(base)
        skipped = ((-1 - base) / step - _MARGIN).floor().maximum(zero).minimum(grid)
        visited = ((extent - base) / step + _MARGIN).ceil().maximum(skipped).minimum(grid) - skipped
        visited = visited.nan_to_num(0)  # an empty box has a grid of 0 and takes no samples
    visited = visited.flatten().long()
    first = visited.cumsum(0) - visited
    bin_of = torch.repeat_interleave(visited)
    sample = torch.arange(len(bin_of), device=base.device) - first[bin_of]
    bin, grid = bin[bin_of // bins, 0], grid[bin_of // bins, 0]
    number = skipped.flatten()[bin_of] + sample + 0.5
    position = base.flatten()[bin_of] + number * bin / grid
    return AxisPositions(position, number, grid, bin_of, first, visited)


def interpolate_along(positions: AxisPositions, extent: int, spec: RoIAlignSpec) -> AxisSamples:
    """The neighbours of each sample along an axis of `extent` pixels, and their weights."""
    position = positions.position
    inside = (position >= -1) & (position <= extent)
    position = position.clamp(0, extent - 1)
    low = position.long().clamp(max=extent - 1)  # beyond 2^24 pixels the position may be rounded up
    fraction = position - low
    weights = torch.stack([1 - fraction, fraction], 1) * inside[:, None]
    if spec.reduction == "mean":
        weights = weights / positions.grid[:, None]
    neighbours = torch.stack([low, (low + 1).clamp(max=extent - 1)], 1)
    return AxisSamples(neighbours, weights, positions.first, positions.visited)


def in_pieces(boxes: Tensor, rows: Tensor, level: Level) -> list[Tensor]:
    """`rows` of `boxes [K, 5]`, in pieces of about `MAX_SAMPLES` samples, which bounds memory for many huge boxes.

    No pieces if there is nothing to sample: no rows, or no pixels.
    """
    num_images, height, width, scale, spec = level
    if not len(rows) or not num_images * height * width:
        return []
    if spec.sampling_ratio > 0:
        per_box = spec.sampling_ratio**2 * spec.pooled_height * spec.pooled_width
        return list(rows.split(max(1, MAX_SAMPLES // per_box)))
    # A bin of n pixels has up to n + 1 samples along an axis, and at most two for each pixel of the level are visited.
    bins = boxes.new_tensor([spec.pooled_width, spec.pooled_height])
    extent = boxes.new_tensor([width, height])
    side = (boxes[rows, 3:] - boxes[rows, 1:3]).abs() * scale
    samples = (side + bins).minimum((2 * extent + 2 * _MARGIN) * bins).prod(1).long()
    _, sizes = torch.unique_consecutive(samples.cumsum(0) // MAX_SAMPLES, return_counts=True)
    return list(rows.split(sizes.tolist()))


def corners_on_level(boxes: Tensor, level: Level) -> tuple[Tensor, ...]:
    """x1, y1, x2, y2 of `boxes [K, 5]`, in pixels of the level."""
    return (boxes[:, 1:] * level.scale - (0.5 if level.spec.aligned else 0.0)).unbind(1)


def sample_boxes(boxes: Tensor, level: Level) -> Samples:
    """All samples of `boxes [K, 5]` on a level of N x H x W pixels."""
    num_images, height, width, _, spec = level
    x1, y1, x2, y2 = corners_on_level(boxes, level)
    rows = interpolate_along(positions_along(y1, y2, spec.pooled_height, height, spec), height, spec)
    columns = interpolate_along(positions_along(x1, x2, spec.pooled_width, width, spec), width, spec)
    row, column, bin, first = pair_samples(rows, columns, len(boxes), spec)
    per_image = len(spec.spatial_scales) if spec.level_rounding == EXPLICIT else 1
    image = (boxes[:, :1].long() // per_image).expand(-1, spec.pooled_height).flatten().repeat_interleave(rows.visited)
    narrow = torch.int32 if max(num_images * height * width, 4 * len(row)) < 2**31 else torch.int64
    in_table = ((image[:, None] * height + rows.neighbours) * width).to(narrow)
    pixel = in_table[row][:, :, None] + columns.neighbours.to(narrow)[column][:, None, :]
    weight = rows.weights[row][:, :, None] * columns.weights[column][:, None, :]
    return Samples(pixel.flatten(1), weight.flatten(1), bin, first)


def pair_samples(
    rows: AxisSamples, columns: AxisSamples, num_boxes: int, spec: RoIAlignSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row sample, column sample and bin of each sample, and the first sample of each bin."""
    device, ratio = rows.first.device, spec.sampling_ratio
    pooled = (spec.pooled_height, spec.pooled_width)
    if ratio > 0:  # the same number of samples in each bin: numbering them needs no division
        shape = (num_boxes, *pooled, ratio, ratio)
        row = torch.arange(num_boxes * pooled[0] * ratio, device=device)
        column = torch.arange(num_boxes * pooled[1] * ratio, device=device)
        row = row.view(-1, pooled[0], 1, ratio, 1).expand(shape).flatten()
        column = column.view(-1, 1, pooled[1], 1, ratio).expand(shape).flatten()
        bins = shape[0] * shape[1] * shape[2]
        bin = torch.arange(bins, device=device)[:, None].expand(-1, ratio * ratio).flatten()
        return row, column, bin, torch.arange(bins + 1, device=device) * ratio**2
    across = columns.visited.view(-1, 1, pooled[1]).expand(-1, pooled[0], -1).flatten()
    visited = rows.visited.repeat_interleave(pooled[1]) * across
    first = torch.cat([visited.new_zeros(1), visited.cumsum(0)])
    bin = torch.repeat_interleave(visited)
    local, across = torch.arange(len(bin), device=device) - first[bin], across[bin]
    row = bin // pooled[1]
    column = row // pooled[0] * pooled[1] + bin % pooled[1]
    return rows.first[row] + local // across, columns.first[column] + local % across, bin, first


@jit()
def size_of(packed):
    """Height and width out of `_runtime.pack_size`."""
    return ((packed >> 31) & 0x3FFFFFFF).to(tl.int32), ((packed >> 1) & 0x3FFFFFFF).to(tl.int32)


@jit()
def scaled_box(box, scale, ALIGNED: tl.constexpr):
    """x1, y1, x2, y2 of the boxes `[image, x1, y1, x2, y2]` at `box`, in pixels of a level."""
    SHIFT: tl.constexpr = 0.5 if ALIGNED else 0.0
    x1 = tl.load(box + 1) * scale - SHIFT
    y1 = tl.load(box + 2) * scale - SHIFT
    x2 = tl.load(box + 3) * scale - SHIFT
    y2 = tl.load(box + 4) * scale - SHIFT
    return x1, y1, x2, y2


@jit()
def finite_box(x1, y1, x2, y2):
    """Whether the sides are finite, and with them the corners; subtracted from itself, infinity is NaN."""
    width, height = x2 - x1, y2 - y1
    return (width - width == 0) & (height - height == 0)


@jit()
def level_of(box, num_images, THRESHOLDS: tl.constexpr, LEVELS: tl.constexpr):
    """Image and level of the boxes at `box`, and whether they are pooled; THRESHOLDS as `thresholds_of` gives them."""
    image = tl.load(box)
    x1, y1, x2, y2 = tl.load(box + 1), tl.load(box + 2), tl.load(box + 3), tl.load(box + 4)
    level = (image * 0).to(tl.int32)
    if LEVELS > 1 and THRESHOLDS is None:
        named = (image >= 0) & (image < num_images * LEVELS)
        place = tl.where(named, image, 0).to(tl.int32)
        image, level = tl.where(named, place // LEVELS, -1), place % LEVELS
    pooled = (image >= 0) & (image < num_images) & finite_box(x1, y1, x2, y2)
    if LEVELS > 1 and THRESHOLDS is not None:
        area = (x2 - x1) * (y2 - y1)
        for boundary in tl.static_range(len(THRESHOLDS)):
            threshold = float_of(tl.full([], THRESHOLDS[boundary], tl.int64), area.dtype)
            level += (area >= threshold).to(tl.int32)
        pooled &= (area >= 0) & (level < LEVELS)
    return tl.where(pooled, image, 0).to(tl.int64), tl.where(pooled, level, 0), pooled


class Bins(NamedTuple):
    """What the bins along one axis of a box share."""

    start: Any  # of the box, in feature pixels
    bin: Any  # size of a bin
    grid: Any  # samples of a bin
    per_grid: Any  # 1 / grid
    step: Any  # between samples
    per_step: Any  # 1 / step
    extent: Any  # pixels of the level


class Axis(NamedTuple):
    """The bins along one axis of boxes, as kernels hold them."""

    start: Any  # of each bin, in feature pixels
    bin: Any  # size of a bin
    grid: Any  # samples of a bin
    skipped: Any  # samples before the first that is visited
    visited: Any  # samples that are visited
    extent: Any  # pixels of the level
    per_grid: Any  # 1 / grid


@jit()
def bins_along(start, end, extent, BINS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """The `Bins` of boxes from `start` to `end`, which are finite."""
    size = end - start
    if not ALIGNED:
        size = tl.maximum(size, 1.0)
    # Not tiny, as `divide_by_constant` needs: aligned corners are multiples of 2^-25.
    bin = divide_by_constant(size, BINS)
    if RATIO > 0:
        grid = tl.full(bin.shape, RATIO, bin.dtype)
        per_grid = tl.full(bin.shape, 1.0 / RATIO, bin.dtype)
        return Bins(start, bin, grid, per_grid, bin, bin, extent)
    grid = tl.maximum(tl.ceil(bin), 0.0)
    samples = tl.maximum(grid, 1.0)
    per_grid = divide(samples * 0 + 1.0, samples)
    step = tl.where(grid > 0, divide_by_reciprocal(bin, samples, per_grid), 1.0)
    return Bins(start, bin, grid, per_grid, step, divide(samples * 0 + 1.0, step), extent)


@jit()
def axis_at(bins, p, RATIO: tl.constexpr):
    """The `Axis` of bins p."""
    base = bins.start + p * bins.bin
    grid, extent = bins.grid, bins.extent
    if RATIO > 0:
        skipped = tl.full(base.shape, 0, base.dtype)
        visited = tl.full(base.shape, RATIO, base.dtype)
    else:
        first = divide_by_reciprocal(-1 - base, bins.step, bins.per_step)
        last = divide_by_reciprocal(extent - base, bins.step, bins.per_step)
        skipped = tl.minimum(tl.maximum(tl.floor(first - 2), 0.0), grid)
        visited = tl.minimum(tl.maximum(tl.ceil(last + 2), skipped), grid) - skipped
    return Axis(base, bins.bin, grid, skipped, visited, extent, bins.per_grid)


@jit()
def axis_of(start, end, p, extent, BINS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """The `Axis` of bins `p` of boxes from `start` to `end`."""
    return axis_at(bins_along(start, end, extent, BINS, RATIO, ALIGNED), p, RATIO)


@jit()
def divide_by_grid(x, axis, RATIO: tl.constexpr = 0):
    """x / grid, rounded to nearest, for positions and weights; a positive RATIO is the grid of every bin."""
    if RATIO > 0:
        return divide_by_constant(x, RATIO)
    return divide_by_reciprocal(x, tl.maximum(axis.grid, 1.0), axis.per_grid)


@jit()
def position_of(axis, sample, RATIO: tl.constexpr = 0):
    """Position of a visited sample, clamped to the level's pixel centres, and whether it was inside."""
    offset = divide_by_grid((axis.skipped + sample + 0.5) * axis.bin, axis, RATIO)
    position = axis.start + offset
    inside = (position >= -1) & (position <= axis.extent)
    return tl.minimum(tl.maximum(position, 0.0), (axis.extent - 1).to(axis.start.dtype)), inside


@jit()
def neighbours(axis, sample, RATIO: tl.constexpr = 0):
    """Low and high neighbour of a sample along an axis, and their weights: 0 outside the level, or if not visited."""
    position, inside = position_of(axis, sample, RATIO)
    if RATIO == 0:
        inside &= sample < axis.visited
    low = tl.minimum(position.to(tl.int32), axis.extent - 1)  # beyond 2^24 pixels the position may be rounded up
    fraction = position - low
    high = tl.minimum(low + 1, axis.extent - 1)
    return low, high, tl.where(inside, 1 - fraction, 0.0), tl.where(inside, fraction, 0.0)
