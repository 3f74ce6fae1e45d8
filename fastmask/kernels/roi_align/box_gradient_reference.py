"""Gradient of RoIAlign with respect to the boxes in plain torch, for CPU tensors; `box_gradient.py` has the formula.

The gradient of each bilinear weight is the product of a bin's gradient and a row of features, four of them per sample.
They are combined to the gradients of the sample's position, and these are summed over the bins of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fastmask.kernels.roi_align.geometry import (
    AxisPositions,
    Level,
    Samples,
    corners_on_level,
    in_pieces,
    interpolate_along,
    pair_samples,
    positions_along,
    sample_boxes,
    select_boxes,
)
from fastmask.kernels.roi_align.reference import as_rows, gradients_of_winners

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import RoIAlignSpec


def roi_align_box_backward_reference(
    grad: Tensor, features: Sequence[Tensor], boxes: Tensor, argmax: Tensor, spec: RoIAlignSpec
) -> Tensor:
    """Gradients of the boxes, `[K, 5]`."""
    num_images, channels = features[0].shape[:2]
    selected = select_boxes(boxes, num_images, spec)
    total = torch.zeros_like(boxes, memory_format=torch.contiguous_format)
    for feature, scale, on_level in zip(features, spec.spatial_scales, selected, strict=True):
        if not len(on_level) or not feature.numel():
            continue
        level = Level(num_images, feature.shape[2], feature.shape[3], scale, spec)
        table = as_rows(feature)
        for rows in in_pieces(boxes, on_level, level):
            samples, grads = sample_boxes(boxes[rows], level), as_rows(grad[rows])
            if spec.reduction == "max":
                winner = argmax[rows].permute(0, 2, 3, 1).reshape(-1, channels)
                of_weights = torch.empty_like(samples.weight)
                for part, of_samples in gradients_of_winners(grads, winner, samples):
                    each = torch.arange(len(of_samples), device=table.device)
                    of_weights[part] = _gradient_of_weights(of_samples, table, samples.pixel[part], each)
            else:
                of_weights = _gradient_of_weights(grads, table, samples.pixel, samples.first[:-1])
            total[rows, 1:] = _gradient_of_corners(of_weights, samples, boxes[rows], level)
    return total


def _gradient_of_weights(grads: Tensor, table: Tensor, pixel: Tensor, first: Tensor) -> Tensor:
    """`[S, 4]` products of the features of each neighbour and the row of `grads` that its sample contributes to."""
    first = first.to(pixel.dtype) * 4
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grads, table, pixel.flatten(), first, first.new_empty(0), 0
    )
    return products.view(-1, 4)


def _gradient_of_corners(of_weights: Tensor, samples: Samples, boxes: Tensor, level: Level) -> Tensor:
    """`[K, 4]` from the gradients of the weights of all samples."""
    _, height, width, scale, spec = level
    x1, y1, x2, y2 = corners_on_level(boxes, level)
    along_y = positions_along(y1, y2, spec.pooled_height, height, spec)
    along_x = positions_along(x1, x2, spec.pooled_width, width, spec)
    rows, columns = interpolate_along(along_y, height, spec), interpolate_along(along_x, width, spec)
    row, column, _, _ = pair_samples(rows, columns, len(boxes), spec)
    of_weights = of_weights.view(-1, 2, 2)  # by row and column of the neighbour
    of_y = ((of_weights[:, 1] - of_weights[:, 0]) * columns.weights[column]).sum(1) * _slope(along_y, height, spec)[row]
    of_x = ((of_weights[:, :, 1] - of_weights[:, :, 0]) * rows.weights[row]).sum(1) * _slope(along_x, width, spec)[
        column
    ]
    y_end = _share_of_end(along_y, y2 - y1, spec.pooled_height, spec)[row]
    x_end = _share_of_end(along_x, x2 - x1, spec.pooled_width, spec)[column]
    corners = torch.stack([of_x * (1 - x_end), of_y * (1 - y_end), of_x * x_end, of_y * y_end], 1)
    order = torch.arange(len(corners), device=corners.device)
    of_bins = embedding_bag(order, corners, samples.first[:-1], mode="sum")
    return of_bins.view(len(boxes), -1, 4).sum(1) * scale


def _slope(positions: AxisPositions, extent: int, spec: RoIAlignSpec) -> Tensor:
    """`[A]` derivative of the high neighbour's weight with respect to the position."""
    slope = ((positions.position > 0) & (positions.position < extent - 1)).to(positions.position.dtype)
    return slope / positions.grid if spec.reduction == "mean" else slope


def _share_of_end(positions: AxisPositions, size: Tensor, bins: int, spec: RoIAlignSpec) -> Tensor:
    """`[A]` derivative of the position with respect to the end of the box; 1 minus it is that of the start."""
    share = (positions.bin % bins + positions.number / positions.grid) / bins
    return share if spec.aligned else share.where((size >= 1)[positions.bin // bins], 0)
