"""RoIPool in plain torch, forward and backward, for CPU tensors.

A level is a table of N * H * W rows of C features. Bins of equal numbers of pixels are pooled together, as a tensor
`[bins, pixels, C]` of rows: its maximum, and the first pixel that is equal to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._rois import image_indices
from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels.roi_align.reference import as_rows
from fastmask.kernels.roi_pool.geometry import bin_spans, levels_of_boxes, lowest_feature, quantise

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import PyramidShape
    from fastmask.kernels.roi_pool.op import RoIPoolSpec

MAX_FEATURES = 1 << 19  # of the bins that are pooled at a time: 2 MB, which stay in cache
MAX_GRADIENTS = 1 << 19  # that the backward scatters at a time: about 12 MB


def roi_pool_reference(features: Sequence[Tensor], boxes: Tensor, spec: RoIPoolSpec) -> tuple[Tensor, Tensor]:
    """Pooled features, and which pixel of its level each is, or -1."""
    output, argmax = spec.empty_outputs(features, boxes)
    rows = output.permute(0, 2, 3, 1)
    if not rows.is_contiguous():
        rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    largest, winner = rows.zero_().flatten(0, 2), argmax.fill_(-1).permute(0, 2, 3, 1).flatten(0, 2)
    selected = _select_boxes(boxes, features[0].shape[0], spec)
    for feature, scale, on_level in zip(features, spec.spatial_scales, selected, strict=True):
        if len(on_level) and feature.numel():
            _pool_level(feature, boxes, on_level, scale, spec, largest, winner)
    if rows.data_ptr() != output.data_ptr():
        output.copy_(rows.permute(0, 3, 1, 2))
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
    feature: Tensor,
    boxes: Tensor,
    on_level: Tensor,
    scale: float,
    spec: RoIPoolSpec,
    largest: Tensor,
    winner: Tensor,
) -> None:
    """Write the rows of `largest` and `winner`, `[K * PH * PW, C]`, that belong to the boxes `on_level`."""
    num_images, channels, height, width = feature.shape
    boxes = boxes[on_level]
    first_pixel = image_indices(boxes, num_images) * (height * width)
    x1, y1, roi_width, roi_height = quantise(boxes, scale)
    top, rows = bin_spans(y1, roi_height, spec.pooled_height, height, boxes.dtype)
    left, columns = bin_spans(x1, roi_width, spec.pooled_width, width, boxes.dtype)
    # Only features above the lowest win: not NaN, not -inf.
    lowest = lowest_feature(feature.dtype)
    table = as_rows(feature).fmax(boxes.new_tensor(lowest))
    has_lowest = bool((table <= lowest).any())

    bins = spec.pooled_height * spec.pooled_width
    place = (on_level[:, None] * bins + torch.arange(bins, device=boxes.device)).flatten()
    corner = ((top * width)[:, :, None] + left[:, None, :]).flatten()
    columns = columns[:, None, :].expand(-1, spec.pooled_height, -1).flatten()
    size, order = (rows.repeat_interleave(spec.pooled_width, 1).flatten() * columns).sort(stable=True)
    sizes, counts = size.unique_consecutive(return_counts=True)
    for pixels, of_size in zip(sizes.tolist(), order.split(counts.tolist()), strict=True):
        if not pixels:
            continue
        number = torch.arange(pixels, device=boxes.device)
        for some in of_size.split(max(1, MAX_FEATURES // (pixels * channels))):
            offset = number // columns[some, None] * width + number % columns[some, None]
            pixel = offset + (corner[some] + first_pixel[some // bins])[:, None]
            sampled = table.index_select(0, pixel.flatten()).view(len(some), pixels, channels)
            maximum = sampled.amax(1)
            first = _first_equal(sampled, maximum, offset).add_(corner[some, None])
            if has_lowest:
                first.masked_fill_(maximum == lowest, -1)
            largest.index_copy_(0, place[some], maximum.to(largest.dtype))
            winner.index_copy_(0, place[some], first.to(winner.dtype))


def _first_equal(sampled: Tensor, maximum: Tensor, offset: Tensor) -> Tensor:
    """The first of the rising `offset[n, m]` whose `sampled[n, m, C]`, which is overwritten, equals `maximum[n, C]`."""
    limit = int(offset.max()) + 1
    exact = sampled.dtype if limit < 2**24 else torch.float64
    hit = torch.eq(sampled, maximum[:, None], out=sampled if exact == sampled.dtype else None).to(exact)
    return limit - hit.mul_((limit - offset)[:, :, None]).amax(1).long()


def roi_pool_backward_reference(
    grad: Tensor, boxes: Tensor, argmax: Tensor, shape: PyramidShape, channels_last: bool, spec: RoIPoolSpec
) -> list[Tensor]:
    """Add each gradient to its winner; on the CPU `scatter_add_` keeps the order of RoIs and bins."""
    grads, channels = [], grad.shape[1]
    selected = _select_boxes(boxes, shape.num_images, spec)
    image = image_indices(boxes, shape.num_images)
    step = max(1, MAX_GRADIENTS // max(1, grad[:1].numel()))
    dtype = compute_dtype(grad.dtype)
    for (height, width), on_level in zip(shape.levels, selected, strict=True):
        pixels = height * width
        if channels_last:
            table = grad.new_zeros(shape.num_images * pixels, channels, dtype=dtype)
            for k in _pieces(on_level, len(boxes), step) if table.numel() else ():
                values, winner = _without_losers(as_rows(grad[k]), argmax[k].permute(0, 2, 3, 1).flatten(0, 2))
                first_pixel = (image[k] * pixels).repeat_interleave(spec.pooled_height * spec.pooled_width)[:, None]
                table.scatter_add_(0, winner + first_pixel, values)
            level = table.view(shape.num_images, height, width, channels).permute(0, 3, 1, 2)
        else:
            level = grad.new_zeros(shape.num_images, channels, height, width, dtype=dtype)
            for k in _pieces(on_level, len(boxes), step) if level.numel() else ():
                winner = argmax[k].to(torch.long, memory_format=torch.contiguous_format)
                values, winner = _without_losers(grad[k].flatten(2), winner.flatten(2))
                for of_image, of_roi, pixel in zip(image[k].tolist(), values, winner, strict=True):
                    level[of_image].flatten(1).scatter_add_(1, pixel, of_roi)
        grads.append(level.to(grad.dtype))
    return grads


def _without_losers(values: Tensor, winner: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in the type of their sum, 0 where nothing won, and valid indices."""
    values = values.to(compute_dtype(values.dtype))
    if winner.numel() and winner.min() < 0:
        return values.where(winner >= 0, 0), winner.clamp(min=0)
    return values, winner


def gather_winners(features: Sequence[Tensor], boxes: Tensor, argmax: Tensor, spec: RoIPoolSpec) -> Tensor:
    """`[K, C, PH, PW]` features at the pixels that argmax names, 0 where it is -1: the backward's transpose."""
    num_images = features[0].shape[0]
    image = boxes[:, 0].nan_to_num(0).clamp(0, num_images - 1).long()  # outside the batch argmax is -1 anyway
    level = levels_of_boxes(boxes, spec)
    gathered = features[0].new_zeros(len(argmax), *argmax.shape[2:], features[0].shape[1]).flatten(0, 2)
    for index, feature in enumerate(features):
        if not feature.numel():
            continue
        winner = argmax.permute(0, 2, 3, 1)
        won = (winner >= 0) & (level == index)[:, None, None, None]
        first_pixel = (image * (feature.shape[2] * feature.shape[3]))[:, None, None, None]
        rows = (winner.where(won, 0) + first_pixel).flatten(0, 2)
        gathered += feature.permute(0, 2, 3, 1).flatten(0, 2).gather(0, rows).where(won.flatten(0, 2), 0)
    return gathered.unflatten(0, (len(argmax), *argmax.shape[2:])).permute(0, 3, 1, 2)
