"""Bitmaps and RLE sampled as RoIAlign samples them: the arithmetic, and the CPU path.

The samples lie where `roi_align(bitmap, box, sampling_ratio, aligned)` has them, in the image that the transform of an
object describes; an adaptive grid has ceil(bin) samples of a bin measured in the object's own pixels. The mean of a
bin is separable: with a row of weights for each bin, Wy and Wx, the target is Wy @ bitmap @ Wx^T. Only the part of the
bitmap that the box reaches is decoded from runs and converted to float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels.mask_targets.polygons import expand
from fastmask.masks import RLE


class Axis(NamedTuple):
    """The weights of the bins of K boxes along one axis."""

    first: list[int]  # the first pixel that the samples of a box touch
    weights: tuple[Tensor, ...]  # of each box, [bins, pixels from the first]


def in_own_pixels(
    start: Tensor, end: Tensor, scale: Tensor, offset: Tensor, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes along one axis, from the image to the pixels of their objects: start, end, and whether they are mirrored.

    Positions there are in pixels whose centres are the integers, so nothing else depends on `aligned`.
    """
    shift = 0.5 if aligned else 0.0
    start, end = start - shift, end - shift
    if not aligned:
        end = start + (end - start).clamp(min=1)
    start, end, mirrored = start * scale + offset, end * scale + offset, scale < 0
    return end.where(mirrored, start), start.where(mirrored, end), mirrored


def sample(
    pixels: Tensor,
    runs: Tensor,
    objects: Tensor,
    transforms: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    aligned: bool,
    ratio: int,
) -> Tensor:
    """The object of each box, sampled in the box.

    Args:
        pixels, runs: as in `Masks`.
        objects, transforms: `[K, 5]` and `[K, 4]`, of each box's object.
        boxes: `[K, 4]` float32, finite.
        size: H, W.
        aligned: whether boxes are shifted by half a pixel.
        ratio: samples per bin and axis; 0: `ceil(bin size)`.

    Returns:
        `[K, H, W]` float32, 0..1.
    """
    out = torch.zeros(len(boxes), *size, dtype=torch.float32, device=boxes.device)
    axes, flips = [], []
    for axis, bins in ((1, size[0]), (0, size[1])):
        transform = transforms[:, axis], transforms[:, 2 + axis]
        start, end, mirrored = in_own_pixels(boxes[:, axis], boxes[:, 2 + axis], *transform, aligned)
        extent = objects[:, 4 - axis].where((end - start).isfinite(), 0)  # so that such a box has no samples
        axes.append(_axis(start, end, extent, bins, ratio))
        flips.append(mirrored)
    rows, columns = axes
    for k, (kind, first, count, height, width) in enumerate(objects.tolist()):
        down, across = rows.weights[k], columns.weights[k]
        if not down.shape[1] or not across.shape[1]:
            continue
        top, left = rows.first[k], columns.first[k]
        bottom, right = top + down.shape[1], left + across.shape[1]
        if kind == RLE:
            ends = runs[first : first + count]
            bitmap = _decode_columns(ends, left * height, right * height).view(-1, height)[:, top:bottom].t()
        else:
            bitmap = pixels[first : first + count].view(height, width)[top:bottom, left:right]
        torch.mm(down @ bitmap.float(), across.t(), out=out[k])
    for dim, mirrored in zip((1, 2), flips, strict=True):
        out = out.flip(dim).where(mirrored[:, None, None], out) if mirrored.any() else out
    return out


def _axis(start: Tensor, end: Tensor, extent: Tensor, bins: int, ratio: int) -> Axis:
    """Weights of the pixels of objects of `extent` pixels, in boxes from `start` to `end`."""
    size, extent = (end - start)[:, None].where(extent[:, None] > 0, 0), extent[:, None].to(start.dtype)
    bin = size / bins
    grid = torch.full_like(bin, ratio) if ratio else bin.ceil().clamp(min=0)
    base = start[:, None] + torch.arange(bins, dtype=bin.dtype, device=bin.device) * bin
    # Only samples that can be inside, and a few more: a box of a billion pixels has as many samples.
    step = bin / grid
    skipped = ((-1 - base) / step - 2).floor().nan_to_num(0).clamp(min=0).minimum(grid)
    visited = ((extent - base) / step + 2).ceil().nan_to_num(0).maximum(skipped).minimum(grid) - skipped
    visited = visited.flatten().long()
    owner, index = expand(visited)
    box = owner // bins
    grid, limit = grid[box, 0], extent[box, 0]
    position = base.flatten()[owner] + (skipped.flatten()[owner] + index + 0.5) * bin[box, 0] / grid
    inside = (position >= -1) & (position <= limit) & (limit > 0)
    owner, box, position, grid, limit = (values[inside] for values in (owner, box, position, grid, limit))
    position = position.maximum(limit.new_zeros(())).minimum(limit - 1)
    low = position.long()
    fraction = position - low
    high = (low + 1).minimum(limit.long() - 1)

    count, unreached = len(start), torch.iinfo(torch.int64).max
    first = low.new_full((count,), unreached).scatter_reduce_(0, box, low, "amin")
    pixels = low.new_zeros(count).scatter_reduce_(0, box, high + 1, "amax") - first
    first, pixels = first.where(pixels > 0, 0), pixels.clamp(min=0)
    begin = (pixels * bins).cumsum(0) - pixels * bins
    row = begin[box] + (owner - box * bins) * pixels[box] - first[box]
    weights = position.new_zeros(int(pixels.sum()) * bins)
    weights.scatter_add_(0, row + low, (1 - fraction) / grid)
    weights.scatter_add_(0, row + high, fraction / grid)
    parts = weights.split((pixels * bins).tolist())
    return Axis(first.tolist(), tuple(part.view(bins, -1) if len(part) else part.view(bins, 0) for part in parts))


def _decode_columns(ends: Tensor, begin: int, end: int) -> Tensor:
    """Pixels `begin` to `end` of an RLE whose runs end at `ends`."""
    clamped = ends.clamp(begin, end).long()
    lengths = clamped.diff(prepend=clamped.new_full((1,), begin))
    values = torch.arange(len(ends), device=ends.device).bitwise_and_(1).to(torch.uint8)
    return torch.repeat_interleave(values, lengths, output_size=end - begin)
