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
from fastmask.kernels._runtime import compute_dtype, empty
from fastmask.kernels.roi_pool.geometry import bin_spans, lowest_feature, quantise

if TYPE_CHECKING:
    from fastmask.kernels.roi_pool.op import RoIPoolSpec

MAX_PIXELS = 1 << 18  # of all bins that are listed at a time: about 20 MB
MAX_GRADIENTS = 1 << 20  # that the backward scatters at a time: about 12 MB


def roi_pool_reference(input: Tensor, boxes: Tensor, spec: RoIPoolSpec) -> tuple[Tensor, Tensor]:
    """Pooled features, and which pixel each is, or -1."""
    num_images, channels, height, width = input.shape
    output, argmax = spec.empty_outputs(input, boxes)
    before = image_indices(boxes, num_images) * (height * width + 1)
    x1, y1, roi_width, roi_height = quantise(boxes, spec.spatial_scale)
    top, rows = bin_spans(y1, roi_height, spec.pooled_height, height, boxes.dtype)
    left, columns = bin_spans(x1, roi_width, spec.pooled_width, width, boxes.dtype)
    corner = (before[:, None] + 1 + top * width)[:, :, None] + left[:, None, :]
    table = _pixel_table(input.permute(0, 2, 3, 1), lowest_feature(input.dtype))
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
    return output, argmax


def roi_pool_backward_reference(
    grad: Tensor, boxes: Tensor, argmax: Tensor, size: Sequence[int], channels_last: bool, spec: RoIPoolSpec
) -> Tensor:
    """Add each gradient to its winner's row; on the CPU `scatter_add_` keeps the order of RoIs and bins."""
    del spec  # argmax names the pixels
    num_images, channels, height, width = size
    image = image_indices(boxes, num_images)
    table = grad.new_zeros(num_images, height * width + 1, channels, dtype=compute_dtype(grad.dtype))
    step = max(1, MAX_GRADIENTS // max(1, grad[:1].numel()))
    for begin in range(0, len(grad), step):
        k = slice(begin, begin + step)
        values = grad[k].permute(0, 2, 3, 1).to(table.dtype).flatten(0, 2)
        table.flatten(0, 1).scatter_add_(0, _winners(argmax[k], image[k], height * width), values)
    pixels = table[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return empty(grad, size, channels_last).copy_(pixels)


def gather_winners(features: Tensor, boxes: Tensor, argmax: Tensor) -> Tensor:
    """`[K, C, PH, PW]` features at the pixels that argmax names, 0 where it is -1: the backward's transpose."""
    num_images, _, height, width = features.shape
    image = boxes[:, 0].nan_to_num(0).clamp(0, num_images - 1).long()  # outside the batch argmax is -1 anyway
    table = _pixel_table(features.permute(0, 2, 3, 1), 0.0)
    rows = table.gather(0, _winners(argmax, image, height * width))
    return rows.unflatten(0, (len(argmax), *argmax.shape[2:])).permute(0, 3, 1, 2)


def _pixel_table(rows: Tensor, before: float) -> Tensor:
    """`[N * (1 + H * W), C]`: of each image a row for pixel -1, filled with `before`, and one for each pixel."""
    return pad(rows.flatten(1, 2), (0, 0, 1, 0), value=before).flatten(0, 1)


def _winners(argmax: Tensor, image: Tensor, pixels: int) -> Tensor:
    """Rows of the pixel table that argmax names, int64 `[K * PH * PW, C]`."""
    return (argmax.permute(0, 2, 3, 1) + (image * (pixels + 1) + 1)[:, None, None, None]).flatten(0, 2)


def _runs(first: Tensor, count: Tensor, step: int = 1) -> Tensor:
    """Concatenate the runs `first[i], first[i] + step, ...` of `count[i]` numbers."""
    origin = torch.repeat_interleave(first - (count.cumsum(0) - count) * step, count)
    return origin + torch.arange(len(origin), device=first.device) * step
