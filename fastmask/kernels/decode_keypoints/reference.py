"""The reference of `decode_keypoints`: bounds of all cells, then the values in those that may have the largest one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels._validation import MAX_INT32
from fastmask.kernels.decode_keypoints.geometry import EXCESS, MAX_SIDE, SLACK

# Heatmap pixels whose cells are bounded at a time: about 1 MB of float32 for each intermediate result.
PIXELS_AT_A_TIME = 1 << 18

# Beyond this share of the resized pixels, `F.interpolate` of the whole heatmap is faster than single cells.
MAX_CANDIDATE_SHARE = 0.25


class _Axis(NamedTuple):
    """The pixels that heatmaps are resized to along one axis: T of all RoIs, one RoI after the other."""

    weights: Tensor  # [T, 4], of the neighbours
    cell: Tensor  # [T], int64, that of the pixel: 0 lies before the first heatmap pixel
    start: Tensor  # [N], the first pixel of each RoI in these lists
    size: Tensor  # [N], pixels of each RoI
    first: Tensor  # [N, cells], the first pixel of each cell in these lists
    pixels: Tensor  # [N, cells], how many pixels each cell has


def _cubic_weights(t: Tensor) -> Tensor:
    """Weights `[T, 4]` of the neighbours at distances 1 + t, t, 1 - t and 2 - t."""
    near = torch.stack([t, 1 - t], 1)
    far = near + 1
    inner = (1.25 * near - 2.25) * near * near + 1
    outer = ((-0.75 * far + 3.75) * far - 6) * far + 3
    return torch.stack([outer[:, 0], inner[:, 0], inner[:, 1], outer[:, 1]], 1)


def _axis(size: Tensor, m: int, dtype: torch.dtype) -> _Axis:
    roi = torch.repeat_interleave(size)
    start = size.cumsum(0) - size
    pixel = (torch.arange(len(roi), device=size.device) - start[roi]).to(dtype)
    position = (pixel + 0.5) * (m / size.to(dtype))[roi] - 0.5
    low = position.floor()
    cell = low.long() + 1
    count = torch.bincount(roi * (m + 1) + cell, minlength=len(size) * (m + 1))
    shape = len(size), m + 1
    first = (count.cumsum(0) - count).view(shape)
    return _Axis(_cubic_weights(position - low), cell, start, size, first, count.view(shape))


def _sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Sides of boxes, at least 1, and the whole pixels that a heatmap is resized to: `[N, 2]`, x and y."""
    sides = boxes[:, 2:] - boxes[:, :2]
    sides = sides.where(sides >= 1, 1)  # NaN too
    return sides, sides.ceil().clamp(max=MAX_SIDE).long()


def _upper_bounds(padded: Tensor) -> Tensor:
    """Bounds of all cells of heatmaps padded by two pixels on each side: `[n, m + 4, m + 4]` to `[n, m + 1, m + 1]`."""
    n, height, width = padded.shape
    flat = padded.flatten()  # whole rows at once: results across the ends of rows belong to no cell
    inner, outer = (flat[1:-2], flat[2:-1]), (flat[:-3], flat[3:])
    largest = torch.maximum(*inner)
    upper = torch.lerp(torch.minimum(*outer), largest, 1 + EXCESS)
    upper = torch.maximum(upper, largest, out=upper)
    smallest = torch.minimum(*inner, out=largest)
    lower = torch.lerp(torch.maximum(*outer), smallest, 1 + EXCESS)
    lower = torch.minimum(lower, smallest, out=lower)
    largest = torch.maximum(upper[width : -2 * width], upper[2 * width : -width])
    bounds = torch.empty_like(flat)
    of_cells = bounds[: len(largest)]
    torch.lerp(torch.minimum(lower[: -3 * width], lower[3 * width :]), largest, 1 + EXCESS, out=of_cells)
    torch.maximum(of_cells, largest, out=of_cells)
    return bounds.view(n, height, width)[:, :-3, :-3]


def _pair_up(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `counts[i]` items of i, one after the other: i, and the item's number."""
    item = torch.repeat_interleave(counts)
    number = torch.arange(len(item), device=counts.device) - (counts.cumsum(0) - counts)[item]
    return item, number


class _Resizing:
    """Heatmaps `[n, m, m]` of some RoIs, and what of them is resized."""

    def __init__(self, heatmaps: Tensor, roi: Tensor, y: _Axis, x: _Axis) -> None:
        self.heatmaps, self.roi, self.y, self.x = heatmaps, roi, y, x
        self.padded = F.pad(heatmaps[None], (2, 2, 2, 2), mode="replicate")[0]
        _, height, width = self.padded.shape
        self.offsets = (torch.arange(4)[:, None] * width + torch.arange(4)).flatten()
        self.stride = height * width, width

    def rows(self, heatmap: Tensor, cell_y: Tensor, cell_x: Tensor, column: Tensor) -> Tensor:
        """Interpolation along x at listed pixels of `x`, in the four rows of a cell: `[..., 4]`."""
        corner = heatmap * self.stride[0] + cell_y * self.stride[1] + cell_x
        values = self.padded.flatten().take(corner[:, None] + self.offsets).unflatten(1, (4, 4))
        return (values * self.x.weights[column, None]).sum(2)

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """The value at the pixel next to the largest heatmap pixel, its number y * w + x, and the largest pixel."""
        m = self.heatmaps.shape[2]
        largest, index = self.heatmaps.flatten(1).max(1)
        pixels = []
        for axis, place in ((self.y, index // m), (self.x, index % m)):
            size, extent = axis.size[self.roi], axis.pixels.shape[1] - 1
            pixels.append(((2 * place + 1) * size // (2 * extent)).minimum(size - 1))
        y, x = pixels
        row, column = self.y.start[self.roi] + y, self.x.start[self.roi] + x
        rows = self.rows(torch.arange(len(index)), self.y.cell[row], self.x.cell[column], column)
        return (rows * self.y.weights[row]).sum(1), y * self.x.size[self.roi] + x, largest

    def argmax(self) -> tuple[Tensor, Tensor]:
        """The largest value of each resized heatmap, and its number y * w + x."""
        best, index, largest = self.start()
        magnitude = torch.maximum(largest, -self.heatmaps.flatten(1).amin(1))
        threshold = best - magnitude * SLACK[best.dtype]
        # Comparisons with NaN and infinity - infinity are false: such heatmaps have no candidates.
        candidates = (_upper_bounds(self.padded) >= threshold[:, None, None]).nonzero()
        heatmap, cell_y, cell_x = candidates.unbind(1)
        roi = self.roi[heatmap]
        across, down = self.x.pixels[roi, cell_x], self.y.pixels[roi, cell_y]

        area = (self.x.size * self.y.size)[self.roi]
        number = torch.zeros_like(area).index_add_(0, heatmap, across * down)
        whole = number > (area * MAX_CANDIDATE_SHARE).clamp(min=256)
        for k in whole.nonzero()[:, 0].tolist():
            size = [int(axis.size[self.roi[k]]) for axis in (self.y, self.x)]
            resized = F.interpolate(self.heatmaps[None, None, k], size=size, mode="bicubic", align_corners=False)
            best[k], index[k] = resized.flatten().max(0)

        # Columns of pixels in a cell: their rows of neighbours, interpolated along x, give a tighter bound.
        across = across.where(~whole[heatmap], 0)
        first = self.x.first[roi, cell_x]
        cell, number = _pair_up(across)
        column = first[cell] + number
        rows = self.rows(heatmap[cell], cell_y[cell], cell_x[cell], column)
        inner = torch.maximum(rows[:, 1], rows[:, 2])
        bounds = inner.lerp(torch.minimum(rows[:, 0], rows[:, 3]), -EXCESS).maximum(inner)
        chosen = (bounds >= threshold[heatmap[cell]]).nonzero()[:, 0]
        cell, column, rows = cell[chosen], column[chosen], rows[chosen]

        # Their pixels.
        first = self.y.first[roi, cell_y]
        of_column, number = _pair_up(down[cell])
        cell = cell[of_column]
        row = first[cell] + number
        values = (rows[of_column] * self.y.weights[row]).sum(1)

        heatmap, roi = heatmap[cell], roi[cell]
        pixel = (row - self.y.start[roi]) * self.x.size[roi] + column[of_column] - self.x.start[roi]
        before = best.clone()
        best.scatter_reduce_(0, heatmap, values, "amax")
        index.masked_fill_(best > before, MAX_INT32)
        index.scatter_reduce_(0, heatmap, pixel.where(values == best[heatmap], MAX_INT32), "amin")
        return best, index


def decode_keypoints_reference(heatmaps: Tensor, boxes: Tensor, convention: str) -> tuple[Tensor, Tensor]:
    """Bounds of all cells of some RoIs at a time, then the values in the cells that may have the largest one."""
    count, points, height, width = heatmaps.shape
    dtype = compute_dtype(heatmaps.dtype)
    boxes = boxes.to(dtype)
    sides, sizes = _sides(boxes)
    maxima, indices = [], []
    rois_at_a_time = max(1, PIXELS_AT_A_TIME // (points * height * width))
    for first in range(0, count, rois_at_a_time):
        some = slice(first, first + rois_at_a_time)
        size = sizes[some]
        resizing = _Resizing(
            heatmaps[some].to(dtype).flatten(0, 1),
            torch.repeat_interleave(torch.arange(len(size)), points),
            _axis(size[:, 1], height, dtype),
            _axis(size[:, 0], width, dtype),
        )
        value, index = resizing.argmax()
        maxima.append(value)
        indices.append(index)
    largest = torch.cat(maxima).view(count, points) if count else boxes.new_empty(0, points)
    index = torch.cat(indices).view(count, points) if count else sizes.new_empty(0, points)
    finite = heatmaps.to(dtype).flatten(2).mul(0).sum(2) == 0
    largest, index = largest.where(finite, torch.nan), index.where(finite, 0)
    pixel = torch.stack([index % sizes[:, :1], index // sizes[:, :1]], 2)
    place = boxes[:, None, :2] + (pixel + 0.5) * (sides / sizes)[:, None]
    if convention == "torchvision":
        return torch.cat([place, torch.ones_like(largest)[..., None]], 2), largest
    probability = (heatmaps.to(dtype).flatten(2) - largest[..., None]).exp_().sum(2).reciprocal_()
    return torch.cat([place, largest[..., None]], 2), probability
