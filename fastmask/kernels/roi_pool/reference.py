"""RoIPool in plain torch, forward and backward, for CPU tensors.

Each image is a table of rows of C features: one for pixel -1, which wins empty bins, then one for each pixel. A bin is
a bag of these rows, of which `_embedding_bag` finds the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmask.kernels._rois import image_indices
from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels.roi_pool.geometry import bin_spans, levels_of_boxes, lowest_feature, quantise

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import PyramidShape
    from fastmask.kernels.roi_pool.op import RoIPoolSpec

MAX_PIXELS = 1 << 18  # of all bins that are listed at a time: about 20 MB
MAX_GRADIENTS = 1 << 20  # that the backward scatters at a time: about 12 MB


def roi_pool_reference(features: Sequence[Tensor], boxes: Tensor, spec: RoIPoolSpec) -> tuple[Tensor, Tensor]:
    """Pooled features, and which pixel of its level each is, or -1."""
    output, argmax = spec.empty_outputs(features, boxes)
    selected = _select_boxes(boxes, features[0].shape[0], spec)
    if sum(map(len, selected)) < len(boxes):
        output.zero_()
        argmax.fill_(-1)
    for feature, scale, on_level in zip(features, spec.spatial_scales, selected, strict=True):
        if len(on_level) == len(boxes):
            _pool_level(feature, boxes, scale, spec, output, argmax)
        elif len(on_level):
            part = spec.empty_outputs([feature], boxes[on_level])
            _pool_level(feature, boxes[on_level], scale, spec, *part)
            output.index_copy_(0, on_level, part[0])
            argmax.index_copy_(0, on_level, part[1])
    return output, argmax


def _select_boxes(boxes: Tensor, num_images: int, spec: RoIPoolSpec) -> list[Tensor]:
    """The rows of `boxes [K, 5]` that are pooled from each level."""
    image_indices(boxes, num_images)  # raises if one is not in the batch
    level = levels_of_boxes(boxes, spec)
    return [(level == index).nonzero()[:, 0] for index in range(len(spec.spatial_scales))]


def _pieces(selected: Tensor, count: int, step: int) -> list[Tensor] | list[slice]:
    """Rows of at most `step` boxes each; of all boxes as slices, which copy nothing."""
    if len(selected) == count:
        return [slice(begin, begin + step) for begin in range(0, count, step)]
    return list(selected.split(step)) if len(selected) else []


def _pool_level(
    feature: Tensor, boxes: Tensor, scale: float, spec: RoIPoolSpec, output: Tensor, argmax: Tensor
) -> None:
    """Pool boxes from one level into `output` and `argmax`."""
    num_images, channels, height, width = feature.shape
    before = image_indices(boxes, num_images) * (height * width + 1)
    x1, y1, roi_width, roi_height = quantise(boxes, scale)
    top, rows = bin_spans(y1, roi_height, spec.pooled_height, height, boxes.dtype)
    left, columns = bin_spans(x1, roi_width, spec.pooled_width, width, boxes.dtype)
    corner = (before[:, None] + 1 + top * width)[:, :, None] + left[:, None, :]
    table = _pixel_table(feature, lowest_feature(feature.dtype))
    index_dtype = torch.int32 if len(table) < 2**31 else torch.int64  # int32 takes two thirds of the time

    pixels = rows.sum(1) * columns.sum(1)
    _, counts = torch.unique_consecutive(pixels.cumsum(0) // MAX_PIXELS, return_counts=True)
    for begin, end in pairwise([0, *counts.cumsum(0).tolist()]):
        k = slice(begin, end)
        none = before[k, None, None].expand_as(corner[k]).flatten()
        bin_columns = columns[k, None, :].expand_as(corner[k]).flatten()
        bin_rows = rows[k, :, None].expand_as(corner[k]).flatten()
        # A bag is pixel -1, then the bin's rows: a bag keeps its first row unless a later one is larger.
        runs = bin_rows + 1
        head = runs.cumsum(0) - runs
        start = _runs(corner[k].flatten() - width, runs, width)
        length = torch.repeat_interleave(bin_columns, runs)
        start[head], length[head] = none, 1
        members = _runs(start, length).to(index_dtype)
        offsets = (length.cumsum(0) - length)[head].to(index_dtype)
        largest, _, _, winner = torch.ops.aten._embedding_bag(table, members, offsets, mode=2)
        largest[bin_rows * bin_columns == 0] = 0
        winner -= (none + 1).to(index_dtype)[:, None]
        bins = (end - begin, spec.pooled_height, spec.pooled_width, channels)
        output[k] = largest.view(bins).permute(0, 3, 1, 2)
        argmax[k] = winner.view(bins).permute(0, 3, 1, 2)


def roi_pool_backward_reference(
    grad: Tensor, boxes: Tensor, argmax: Tensor, shape: PyramidShape, channels_last: bool, spec: RoIPoolSpec
) -> list[Tensor]:
    """Add each gradient to its winner's row; on the CPU `scatter_add_` keeps the order of RoIs and bins."""
    grads = shape.empty_features(grad, channels_last)
    selected = _select_boxes(boxes, shape.num_images, spec)
    image = image_indices(boxes, shape.num_images)
    step = max(1, MAX_GRADIENTS // max(1, grad[:1].numel()))
    for level, (height, width), on_level in zip(grads, shape.levels, selected, strict=True):
        rows = (shape.num_images, height * width + 1, grad.shape[1])
        table = grad.new_zeros(rows, dtype=compute_dtype(grad.dtype))
        for k in _pieces(on_level, len(boxes), step):
            values = grad[k].permute(0, 2, 3, 1).to(table.dtype).flatten(0, 2)
            table.flatten(0, 1).scatter_add_(0, _winners(argmax[k], image[k], height * width), values)
        level.copy_(table[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2))
    return grads


def gather_winners(features: Sequence[Tensor], boxes: Tensor, argmax: Tensor, spec: RoIPoolSpec) -> Tensor:
    """`[K, C, PH, PW]` features at the pixels that argmax names, 0 where it is -1: the backward's transpose."""
    num_images = features[0].shape[0]
    image = boxes[:, 0].nan_to_num(0).clamp(0, num_images - 1).long()  # outside the batch argmax is -1 anyway
    level = levels_of_boxes(boxes, spec)
    gathered = features[0].new_zeros(len(argmax) * argmax[:1, 0].numel(), features[0].shape[1])
    for index, feature in enumerate(features):
        winner = argmax.where((level == index)[:, None, None, None], -1)
        rows = _winners(winner, image, feature.shape[2] * feature.shape[3])
        gathered += _pixel_table(feature, 0.0).gather(0, rows)
    return gathered.unflatten(0, (len(argmax), *argmax.shape[2:])).permute(0, 3, 1, 2)


def _pixel_table(feature: Tensor, before: float) -> Tensor:
    """`[N * (1 + H * W), C]`: of each image a row for pixel -1, filled with `before`, and one for each pixel."""
    return pad(feature.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, 1, 0), value=before).flatten(0, 1)


def _winners(argmax: Tensor, image: Tensor, pixels: int) -> Tensor:
    """Rows of the pixel table that argmax names, int64 `[K * PH * PW, C]`."""
    return (argmax.permute(0, 2, 3, 1) + (image * (pixels + 1) + 1)[:, None, None, None]).flatten(0, 2)


def _runs(first: Tensor, count: Tensor, step: int = 1) -> Tensor:
    """Concatenate the runs `first[i], first[i] + step, ...` of `count[i]` numbers."""
    origin = torch.repeat_interleave(first - (count.cumsum(0) - count) * step, count)
    return origin + torch.arange(len(origin), device=first.device) * step
