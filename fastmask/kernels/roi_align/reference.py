"""RoIAlign in plain torch, forward and backward, for CPU tensors.

A level is a table of N * H * W rows of C features. Each bin is a bag of rows, four per sample, and `embedding_bag`
sums them with their weights; several times faster than a scalar loop per output. The backward is its transpose:
each pixel is a bag of the bins that sampled it, in their order, so that repeated runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels.roi_align.geometry import Level, Samples, in_pieces, sample_boxes, select_boxes

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import PyramidShape, RoIAlignSpec

# Copies of single pixels take as long as a copy of the whole level if more than this share of its pixels is sampled.
MAX_SAMPLED_SHARE = 0.5
# Channels whose rows are copied at a time, so that the copy's memory is small enough for the allocator to reuse, and
# channels that are transposed at a time; the fastest of {32, 64, 128, 256} x {32, 64, all} for P2 with 256 channels.
COPIED_CHANNELS = 64
TRANSPOSED_CHANNELS = 32
# Elements that the maximum keeps at a time: values, or gradients, of single samples.
MAX_VALUES = 1 << 25


def roi_align_reference(features: Sequence[Tensor], boxes: Tensor, spec: RoIAlignSpec) -> tuple[Tensor, Tensor]:
    """Pooled features, and for the maximum which sample of its bin each is."""
    num_images = features[0].shape[0]
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
        pieces = in_pieces(boxes, on_level, level)
        blocks, table = _channel_blocks(feature) if len(pieces) == 1 else [slice(None)], None
        for rows in pieces:
            samples, index = sample_boxes(boxes[rows], level), None
            if len(pieces) == 1:
                samples, index = _renumber_few(samples, feature)
            for block in blocks if index is None else [slice(None)]:
                if table is None or len(pieces) == 1:
                    table = as_rows(feature[:, block], index)
                values, winner = _pool_samples(table, samples, spec.reduction)
                values = values.to(dtype).view(-1, *pooled, table.shape[1]).permute(0, 3, 1, 2)
                output[:, block].index_copy_(0, rows, values)
                if winner is not None:
                    winner = winner.to(argmax.dtype).view(-1, *pooled, table.shape[1]).permute(0, 3, 1, 2)
                    argmax[:, block].index_copy_(0, rows, winner)
    return output, argmax


def _channel_blocks(feature: Tensor) -> list[slice]:
    """All channels at once where their rows are a view of `feature [N, C, H, W]`, else blocks of them."""
    if feature.permute(0, 2, 3, 1).is_contiguous():
        return [slice(None)]
    return [slice(start, start + COPIED_CHANNELS) for start in range(0, feature.shape[1], COPIED_CHANNELS)]


def as_rows(pixels: Tensor, index: Tensor | None = None) -> Tensor:
    """`[N * H * W, C]` in the dtype of sums, from `[N, C, H, W]`; only the ascending rows `index` unless it is None."""
    num_images, channels, height, width = pixels.shape
    rows, dtype = pixels.permute(0, 2, 3, 1), compute_dtype(pixels.dtype)
    if rows.is_contiguous():
        table = rows.flatten(0, 2)
        return (table if index is None else table.index_select(0, index)).to(dtype)
    size = height * width
    table = torch.empty(num_images * size if index is None else len(index), channels, dtype=dtype, device=pixels.device)
    in_image = [] if index is None else _split_by_image(index, num_images, size)
    for start in range(0, channels, TRANSPOSED_CHANNELS):
        block = slice(start, start + TRANSPOSED_CHANNELS)
        columns, pixels_of_block = table[:, block], pixels[:, block].flatten(2)
        if index is None:
            columns.unflatten(0, (num_images, size)).copy_(pixels_of_block.transpose(1, 2))
        else:
            for part, image, some in zip(
                columns.split([len(some) for some in in_image]), pixels_of_block, in_image, strict=True
            ):
                part.copy_(image.gather(1, some.expand(len(image), -1)).t())  # faster than index_select
    return table


def _renumber_few(samples: Samples, feature: Tensor) -> tuple[Samples, Tensor | None]:
    """If rows are copies, and few pixels are sampled: samples of a table of these pixels, and the pixels. Else None."""
    num_images, _, height, width = feature.shape
    pixels = num_images * height * width
    if feature.permute(0, 2, 3, 1).is_contiguous() and feature.dtype == compute_dtype(feature.dtype):
        return samples, None
    sampled = torch.zeros(pixels, dtype=torch.bool, device=feature.device)
    sampled[samples.pixel.flatten()] = True
    index = sampled.nonzero()[:, 0]
    if len(index) > pixels * MAX_SAMPLED_SHARE:
        return samples, None
    place = sampled.cumsum(0, dtype=samples.pixel.dtype).sub_(1)
    return samples._replace(pixel=place[samples.pixel]), index


def _pool_samples(table: Tensor, samples: Samples, reduction: str) -> tuple[Tensor, Tensor | None]:
    """Mean or maximum `[bins, C]` over each bin's samples of a table, and the maximum's winners."""
    if reduction == "max":
        return _max_of_samples(table, samples)
    first = samples.first[:-1].to(samples.pixel.dtype) * 4
    weight = samples.weight.flatten()
    return embedding_bag(samples.pixel.flatten(), table, first, mode="sum", per_sample_weights=weight), None


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
    grads = shape.empty_features(grad, channels_last)
    for i, (scale, on_level) in enumerate(zip(spec.spatial_scales, selected, strict=True)):
        level = Level(num_images, grads[i].shape[2], grads[i].shape[3], scale, spec)
        pieces = in_pieces(boxes, on_level if channels else on_level[:0], level)
        if len(pieces) == 1 and spec.reduction == "mean":
            samples, of_boxes = sample_boxes(boxes[on_level], level), grad[on_level]
            pixels = num_images * level.height * level.width
            few = samples.pixel.numel() < pixels * 2 * MAX_SAMPLED_SHARE
            bags = _bags_of_pixels(samples.bin, samples.pixel, samples.weight, None if few else pixels)
            for block in _channel_blocks(grads[i]):
                rows = _sum_bags(as_rows(of_boxes[:, block]), bags).to(grad.dtype)
                if few or not channels_last:
                    write_rows(grads[i][:, block], rows, bags.pixel)
                else:  # there is one block, and its rows are the level
                    grads[i] = rows.view(num_images, level.height, level.width, -1).permute(0, 3, 1, 2)
        else:
            write_rows(grads[i], _sum_pieces(grad, boxes, argmax, pieces, level).to(grad.dtype), None)
    return grads


def _sum_pieces(grad: Tensor, boxes: Tensor, argmax: Tensor, pieces: list[Tensor], level: Level) -> Tensor:
    """Sums `[N * H * W, C]` of the gradients of the boxes in all pieces."""
    pixels = level.num_images * level.height * level.width
    total = grad.new_zeros(pixels, grad.shape[1], dtype=compute_dtype(grad.dtype))
    for rows in pieces:
        samples, table = sample_boxes(boxes[rows], level), as_rows(grad[rows])
        if level.spec.reduction == "max":
            winner = argmax[rows].permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
            _scatter_to_winners(total, table, winner, samples)
        else:
            total += _sum_bags(table, _bags_of_pixels(samples.bin, samples.pixel, samples.weight, pixels))
    return total


def _split_by_image(pixel: Tensor, num_images: int, size: int) -> list[Tensor]:
    """Ascending pixels of a batch as pixels of each of its images, which have `size` pixels."""
    counts = torch.bincount(pixel // size, minlength=num_images).tolist()
    return [part - image * size for image, part in enumerate(pixel.split(counts))]


def write_rows(level: Tensor, rows: Tensor, pixel: Tensor | None) -> None:
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


class _Bags(NamedTuple):
    """Weighted sums of rows of a table, one for each of P pixels, over S entries."""

    row: Tensor  # [S]
    weight: Tensor  # [S]
    first: Tensor  # [P] the first entry of each pixel
    pixel: Tensor | None  # [P] the pixels, or None for all


def _bags_of_pixels(row: Tensor, pixel: Tensor, weight: Tensor, pixels: int | None) -> _Bags:
    """The bags of all `pixels`, or if None of those that occur, over the four entries `[n, 4]` of each row `[n]`.

    Entries of a pixel keep their order, so that repeated runs give the same bits.
    """
    pixel, order = pixel.flatten().sort(stable=True)
    if pixels is None:
        index, count = pixel.unique_consecutive(return_counts=True)
        index, first = index.long(), (count.cumsum(0) - count).to(pixel.dtype)
    else:
        index, first = None, torch.searchsorted(pixel, torch.arange(pixels, dtype=pixel.dtype, device=pixel.device))
    return _Bags(row[order // 4], weight.flatten()[order], first, index)


def _sum_bags(table: Tensor, bags: _Bags) -> Tensor:
    return embedding_bag(bags.row, table, bags.first, mode="sum", per_sample_weights=bags.weight)


def _scatter_to_winners(total: Tensor, table: Tensor, winner: Tensor, samples: Samples) -> None:
    """Add each bin's gradient to the sample that won it, per channel, then to the pixels of that sample."""
    for part, sampled in gradients_of_winners(table, winner, samples):
        rows = torch.arange(len(sampled), device=table.device)
        bags = _bags_of_pixels(rows, samples.pixel[part], samples.weight[part], len(total))
        total += _sum_bags(sampled, bags)


def gradients_of_winners(table: Tensor, winner: Tensor, samples: Samples) -> Iterator[tuple[slice, Tensor]]:
    """The gradients `[n, C]` of n samples at a time: those of their bins where they won, otherwise 0."""
    local = torch.arange(len(samples.bin), device=table.device) - samples.first[samples.bin]
    step = max(1, MAX_VALUES // table.shape[1])
    for start in range(0, len(local), step):
        part = slice(start, start + step)
        won = winner[samples.bin[part]] == local[part, None]
        yield part, table[samples.bin[part]].where(won, 0)
