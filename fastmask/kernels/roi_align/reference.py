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

from fastmask.kernels._runtime import compute_dtype, empty
from fastmask.kernels.roi_align.geometry import Level, Samples, in_pieces, sample_boxes, select_boxes

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import PyramidShape, RoIAlignSpec

# Copies of single pixels take as long as a copy of the whole level if more than this share of its pixels is sampled.
MAX_SAMPLED_SHARE = 0.5
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
        table, pieces = None, in_pieces(boxes, on_level, level)
        for rows in pieces:
            samples = sample_boxes(boxes[rows], level)
            if table is None:
                table, samples = (as_rows(feature), samples) if len(pieces) > 1 else _sampled_rows(feature, samples)
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


def _sampled_rows(feature: Tensor, samples: Samples) -> tuple[Tensor, Samples]:
    """`as_rows(feature)`, and the samples. If that is a copy and few pixels are sampled, their rows alone."""
    num_images, channels, height, width = feature.shape
    pixels = num_images * height * width
    rows = feature.permute(0, 2, 3, 1)
    if rows.is_contiguous() and feature.dtype == compute_dtype(feature.dtype):
        return rows.view(pixels, channels), samples
    sampled = torch.zeros(pixels, dtype=torch.bool, device=feature.device)
    sampled[samples.pixel.flatten()] = True
    index = sampled.nonzero()[:, 0]
    if len(index) > pixels * MAX_SAMPLED_SHARE:
        return as_rows(feature), samples
    place = sampled.cumsum(0, dtype=samples.pixel.dtype).sub_(1)
    if rows.is_contiguous():
        table = rows.view(pixels, channels).index_select(0, index)
    else:
        in_image = _split_by_image(index, num_images, height * width)
        parts = zip(feature.flatten(2), in_image, strict=True)
        table = torch.cat([image.index_select(1, pixel).t() for image, pixel in parts])
    return table.to(compute_dtype(feature.dtype)), samples._replace(pixel=place[samples.pixel])


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
        level = Level(num_images, height, width, scale, spec)
        sums, sampled = _sum_samples(grad, boxes, argmax, on_level if channels else on_level[:0], level)
        in_level = empty(grad, (num_images, channels, height, width), channels_last)
        _write_rows(in_level, sums.to(grad.dtype), sampled)
        grads.append(in_level)
    return grads


def _sum_samples(
    grad: Tensor, boxes: Tensor, argmax: Tensor, on_level: Tensor, level: Level
) -> tuple[Tensor, Tensor | None]:
    """Sums `[P, C]` of the gradients of the boxes `on_level`, and the pixels of these sums; None: all pixels."""
    pixels, total = level.num_images * level.height * level.width, None
    pieces = in_pieces(boxes, on_level, level)
    for rows in pieces:
        samples, table = sample_boxes(boxes[rows], level), as_rows(grad[rows])
        if level.spec.reduction == "max":
            winner = argmax[rows].permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
            part = _scatter_to_winners(table, winner, samples, pixels)
        elif len(pieces) == 1 and samples.pixel.numel() < pixels * 2 * MAX_SAMPLED_SHARE:
            return _gather_pixels(table, samples.bin, samples.pixel, samples.weight)
        else:
            part, _ = _gather_pixels(table, samples.bin, samples.pixel, samples.weight, pixels)
        total = part if total is None else total.add_(part)
    return grad.new_zeros(pixels, grad.shape[1]) if total is None else total, None


def _split_by_image(pixel: Tensor, num_images: int, size: int) -> list[Tensor]:
    """Ascending pixels of a batch as pixels of each of its images, which have `size` pixels."""
    counts = torch.bincount(pixel // size, minlength=num_images).tolist()
    return [part - image * size for image, part in enumerate(pixel.split(counts))]


def _write_rows(level: Tensor, rows: Tensor, pixel: Tensor | None) -> None:
    """Fill `level [N, C, H, W]` with `rows [P, C]` at the pixels `[P]`, and zeros elsewhere; None: all pixels."""
    num_images, channels, height, width = level.shape
    table = level.permute(0, 2, 3, 1)
    if pixel is None:
        # As matrices: the copy of a transposed matrix is blocked.
        for image, part in zip(level.flatten(2), rows.view(num_images, height * width, channels), strict=True):
            image.copy_(part.t())
    elif table.is_contiguous():
        table.zero_().view(-1, channels).index_copy_(0, pixel, rows)
    else:
        in_image = _split_by_image(pixel, num_images, height * width)
        for image, part, local in zip(
            level.zero_().flatten(2), rows.split(list(map(len, in_image))), in_image, strict=True
        ):
            image.index_copy_(1, local, part.t())


def _gather_pixels(
    table: Tensor, row: Tensor, pixel: Tensor, weight: Tensor, pixels: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sums `[P, C]` of `weight * table[row]` over entries `[S, 4]`, in a fixed order, and their pixels.

    The sums are those of all `pixels`, or if None, of the pixels that occur.
    """
    pixel, order = pixel.flatten().sort(stable=True)
    if pixels is None:
        index, count = pixel.unique_consecutive(return_counts=True)
        index = index.long()
        first = (count.cumsum(0) - count).to(pixel.dtype)
    else:
        index = torch.arange(pixels, dtype=pixel.dtype, device=pixel.device)
        first = torch.searchsorted(pixel, index)
    weight = weight.flatten()[order]
    return embedding_bag(row[order // 4], table, first, mode="sum", per_sample_weights=weight), index


def _scatter_to_winners(table: Tensor, winner: Tensor, samples: Samples, pixels: int) -> Tensor:
    """Each bin's gradient to the sample that won it, per channel, then to the pixels of that sample."""
    total = table.new_zeros(pixels, table.shape[1])
    for part, sampled in gradients_of_winners(table, winner, samples):
        rows = torch.arange(len(sampled), device=table.device)
        total += _gather_pixels(sampled, rows, samples.pixel[part], samples.weight[part], pixels)[0]
    return total


def gradients_of_winners(table: Tensor, winner: Tensor, samples: Samples) -> Iterator[tuple[slice, Tensor]]:
    """The gradients `[n, C]` of n samples at a time: those of their bins where they won, otherwise 0."""
    local = torch.arange(len(samples.bin), device=table.device) - samples.first[samples.bin]
    step = max(1, MAX_VALUES // table.shape[1])
    for start in range(0, len(local), step):
        part = slice(start, start + step)
        won = winner[samples.bin[part]] == local[part, None]
        yield part, table[samples.bin[part]].where(won, 0)
