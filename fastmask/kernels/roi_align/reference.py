"""RoIAlign in plain torch, forward and backward, for CPU tensors.

A level is a table of N * H * W rows of C features. Each bin is a bag of rows, four per sample, and `embedding_bag`
sums them with their weights; several times faster than a scalar loop per output. The backward is its transpose:
each pixel is a bag of the bins that sampled it, in their order, so that repeated runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels.roi_align.geometry import Level, Samples, in_pieces, sample_boxes, select_boxes

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import PyramidShape, RoIAlignSpec

# Elements that the maximum keeps at a time: values, or gradients, of single samples.
MAX_VALUES = 1 << 25


def roi_align_reference(features: Sequence[Tensor], boxes: Tensor, spec: RoIAlignSpec) -> tuple[Tensor, Tensor]:
    """Pooled features, and for the maximum which sample of its bin each is."""
    num_images, channels = features[0].shape[:2]
    dtype, pooled = features[0].dtype, (spec.pooled_height, spec.pooled_width)
    output, argmax = spec.empty_outputs(features, boxes)
    selected = select_boxes(boxes, num_images, spec)
    if sum(map(len, selected)) < len(boxes) or not all(feature.numel() for feature in features):
        output.zero_()
        argmax.zero_()
    for feature, scale, on_level in zip(features, spec.spatial_scales, selected, strict=True):
        if not len(on_level) or not feature.numel():
            continue
        level = Level(num_images, feature.shape[2], feature.shape[3], scale, spec)
        table = as_rows(feature)
        for rows in in_pieces(boxes, on_level, level):
            samples = sample_boxes(boxes[rows], level)
            if spec.reduction == "max":
                values, winner = _max_of_samples(table, samples)
                winner = winner.to(argmax.dtype).view(-1, *pooled, channels).permute(0, 3, 1, 2)
                argmax.index_copy_(0, rows, winner)
            else:
                values = embedding_bag(
                    samples.pixel.flatten(),
                    table,
                    samples.first[:-1].to(samples.pixel.dtype) * 4,
                    mode="sum",
                    per_sample_weights=samples.weight.flatten(),
                )
            output.index_copy_(0, rows, values.view(-1, *pooled, channels).permute(0, 3, 1, 2).to(dtype))
    return output, argmax


def as_rows(pixels: Tensor) -> Tensor:
    """`[N * H * W, C]` in the dtype of sums, from `[N, C, H, W]`."""
    rows = pixels.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return rows.reshape(-1, pixels.shape[1]).to(compute_dtype(pixels.dtype))


def _max_of_samples(table: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Maximum over each bin's samples, and which sample of the bin it was, first of equals."""
    bins = len(samples.first) - 1
    values, winners = table.new_zeros(bins, table.shape[1]), samples.bin.new_zeros(bins, table.shape[1])
    per_bin = max(1, int(samples.first.diff().max()))
    step = max(1, MAX_VALUES // (per_bin * table.shape[1]))
    for start in range(0, bins, step):
        first = samples.first[start : start + step + 1]
        visited = slice(int(first[0]), int(first[-1]))
        if visited.start == visited.stop:
            continue
        sampled = embedding_bag(samples.pixel[visited], table, mode="sum", per_sample_weights=samples.weight[visited])
        offsets = first[:-1] - first[0]
        order = torch.arange(len(sampled), device=table.device)
        best, _, _, winner = torch.ops.aten._embedding_bag(sampled, order, offsets, False, 2)
        values[start : start + step] = best
        winners[start : start + step] = (winner - offsets[:, None]).clamp(min=0)
    return values, winners


def roi_align_backward_reference(
    grad: Tensor, boxes: Tensor, argmax: Tensor, shape: PyramidShape, channels_last: bool, spec: RoIAlignSpec
) -> list[Tensor]:
    """Gradients of the levels."""
    channels, num_images = grad.shape[1], shape.num_images
    selected = select_boxes(boxes, num_images, spec)
    grads = []
    for (height, width), scale, on_level in zip(shape.levels, spec.spatial_scales, selected, strict=True):
        level, pixels = Level(num_images, height, width, scale, spec), num_images * height * width
        on_level = on_level if channels else on_level[:0]
        total = None
        for rows in in_pieces(boxes, on_level, level):
            samples = sample_boxes(boxes[rows], level)
            table = as_rows(grad[rows])
            if spec.reduction == "max":
                winner = argmax[rows].permute(0, 2, 3, 1).reshape(-1, channels)
                part = _scatter_to_winners(table, winner, samples, pixels)
            else:
                part = _gather_pixels(table, samples.bin, samples.pixel, samples.weight, pixels)
            total = part if total is None else total.add_(part)
        if total is None:
            total = grad.new_zeros(pixels, channels)
        grads.append(_in_format(total.to(grad.dtype).view(num_images, height, width, channels), channels_last))
    return grads


def _in_format(level: Tensor, channels_last: bool) -> Tensor:
    """`[N, C, H, W]` in the requested format, from `[N, H, W, C]`."""
    if channels_last:
        return level.permute(0, 3, 1, 2)
    num_images, height, width, channels = level.shape
    contiguous = level.new_empty(num_images, channels, height, width)
    for to, image in zip(contiguous, level, strict=True):  # as matrices, whose transposed copy is blocked
        to.flatten(1).copy_(image.flatten(0, 1).t())
    return contiguous


def _gather_pixels(table: Tensor, row: Tensor, pixel: Tensor, weight: Tensor, pixels: int) -> Tensor:
    """`[pixels, C]` sums of `weight * table[row]`, over entries `[S, 4]`, in a fixed order."""
    pixel, order = pixel.flatten().sort(stable=True)
    first = torch.searchsorted(pixel, torch.arange(pixels, dtype=pixel.dtype, device=pixel.device))
    return embedding_bag(row[order // 4], table, first, mode="sum", per_sample_weights=weight.flatten()[order])


def _scatter_to_winners(table: Tensor, winner: Tensor, samples: Samples, pixels: int) -> Tensor:
    """Each bin's gradient to the sample that won it, per channel, then to the pixels of that sample."""
    total = table.new_zeros(pixels, table.shape[1])
    for part, sampled in gradients_of_winners(table, winner, samples):
        rows = torch.arange(len(sampled), device=table.device)
        total += _gather_pixels(sampled, rows, samples.pixel[part], samples.weight[part], pixels)
    return total


def gradients_of_winners(table: Tensor, winner: Tensor, samples: Samples) -> Iterator[tuple[slice, Tensor]]:
    """The gradients `[n, C]` of n samples at a time: those of their bins where they won, otherwise 0."""
    local = torch.arange(len(samples.bin), device=table.device) - samples.first[samples.bin]
    step = max(1, MAX_VALUES // table.shape[1])
    for start in range(0, len(local), step):
        part = slice(start, start + step)
        won = winner[samples.bin[part]] == local[part, None]
        yield part, table[samples.bin[part]].where(won, 0)
