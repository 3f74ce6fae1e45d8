"""COCO's encoding of pasted masks in plain PyTorch: from the mask's rows to where runs end, without pasting.

Along a column x of the image a pasted mask is linear between two mask rows. So it crosses the threshold between two
mask rows that lie on different sides of it, at a place that follows from them: n * w * m numbers decide instead of the
n * w * h pixels of the boxes. All crossings, as positions p = x * H + y of the first pixel behind them, rise within a
mask. Those that fall on one pixel cancel in pairs: this leaves the ends of runs, also where a column of ones continues
in the next one, where several mask rows lie between two pixels, and beyond the image's border.

The result has to be that of `paste_masks_reference`, whose rounding depends on the matrix product that it calls. The
interpolated rows are the same product. For the second one it is enough that no pixel lies within its rounding error of
the threshold (`_column_crossings`). A mask of which that cannot be said, one or two of 100, is pasted and scanned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._mask_sampling import Placement, hat_weights, mask_position, pixel_positions, place_masks
from fastmask.kernels._runtime import Size, compute_dtype
from fastmask.kernels.encode_rle.text import encode_ends
from fastmask.kernels.paste_masks import PasteSpec, paste_masks_reference

# Masks whose interpolated rows, at most W * (m + 2) each, are held at a time.
REFERENCE_MASKS = 64


class RLESpec(NamedTuple):
    """The settings of `encode_rle`, as its public function documents them."""

    height: Size
    width: Size
    threshold: float
    convention: str


class _Crossings(NamedTuple):
    """Where columns of a group of masks cross the threshold, by mask and then by position."""

    mask: Tensor  # [K]
    position: Tensor  # [K] x * H + y of the first pixel behind the crossing
    uncertain: Tensor  # [n] of each mask, whether rounding decides


def _column_crossings(masks: Tensor, placement: Placement, threshold: float, height: int) -> _Crossings:
    """All crossings of `masks` that lie at `placement`, for a threshold above 0.

    A product's value is off by at most 1.5 eps max(|a|, |b|) for mask rows a and b: eps / 4 for each of the two
    weights, eps / 2 for each of two products and their sum. Between rows on the same side, a value may reach the
    threshold only where a row is within 2 eps of it.
    """
    m, eps = masks.shape[-1], torch.finfo(masks.dtype).eps
    mask, x, position, count = pixel_positions(placement, 0)
    rows = masks.new_zeros(len(mask), m + 2)  # of each column of the image, between rows of zeros
    weights, inner = hat_weights(position, m).split(count), rows[:, 1:-1].split(count)
    for pixels, columns, out in zip(masks, weights, inner, strict=True):
        if len(out):
            out.T.copy_(pixels @ columns.T)  # to the bit as in paste_masks_reference
    above, below = rows >= threshold * (1 + 8 * eps), rows < threshold * (1 - 8 * eps)
    uncertain = ~(masks.flatten(1).abs().amax(1) < 1e30)  # also of NaN
    if not (sure := above ^ below).all():
        uncertain[mask[~sure.all(1)]] = True

    crossing = (above[:, 1:] ^ above[:, :-1]).flatten().nonzero()[:, 0]
    column = crossing // (m + 1)
    mask, x = mask[column], x[column]
    a = rows.flatten()[crossing + column].double()
    b = rows.flatten()[crossing + column + 1].double()
    row = crossing - column * (m + 1) - 1  # that a is
    first, last = placement.first[mask, 1], placement.last[mask, 1]
    start, scale = placement.start[mask, 1], placement.scale[mask, 1]
    exact = (row + (threshold - a) / (b - a) + (0.5 + placement.padding)) / scale + start.double() - 0.5
    y = exact.nan_to_num(0).ceil().maximum(first.double()).minimum(last.double()).long()

    def beyond(y: Tensor) -> Tensor:
        """How far the value at y is on the side of b, at most b itself."""
        share = (mask_position(y, start, scale, placement.padding).double() - row).clamp(0, 1)
        return torch.lerp(a - threshold, b - threshold, share) * (b - a).sign()

    margin = 2 * (eps + torch.finfo(torch.float64).eps) * a.abs().maximum(b.abs())
    certain = ((beyond(y) > margin) | (y == last)) & ((beyond(y - 1) < -margin) | (y == first))
    uncertain[mask[~certain]] = True
    return _Crossings(mask, x * height + y, uncertain)


def _cancel_pairs(crossings: Tensor) -> Tensor:
    """The values that occur an odd number of times in a sorted list."""
    values, times = torch.unique_consecutive(crossings, return_counts=True)
    return values[times & 1 == 1]


def encode_rle_reference(masks: Tensor, boxes: Tensor, spec: RLESpec) -> tuple[Tensor, Tensor]:
    """The strings of all masks, one after the other, and their lengths."""
    dtype, m = compute_dtype(masks.dtype), masks.shape[-1]
    stride = spec.height * spec.width + 1  # between the positions of masks, which may end at the image's last pixel
    threshold = torch.tensor(spec.threshold, dtype=dtype, device="cpu").item()  # rounded, as pasting compares
    placement = place_masks(boxes, m, dtype, spec.height, spec.width, spec.convention)
    masks = masks.to(dtype)
    ends: list[Tensor] = [masks.new_empty(0, dtype=torch.int64)]
    for begin in range(0, len(masks), REFERENCE_MASKS):
        group = masks[begin : begin + REFERENCE_MASKS]
        if threshold > 0:
            some = placement.group(begin, begin + REFERENCE_MASKS)
            mask, position, uncertain = _column_crossings(group, some, threshold, spec.height)
            count = mask.bincount(minlength=len(group)).tolist()
            ends_of = list(((mask + begin) * stride + position).split(count))
        else:  # outside the box pixels are inside the mask
            uncertain, ends_of = torch.ones(len(group), dtype=torch.bool, device="cpu"), [ends[0]] * len(group)
        for n in uncertain.nonzero()[:, 0].tolist():
            one = slice(begin + n, begin + n + 1)
            pasted = paste_masks_reference(masks[one], boxes[one], PasteSpec(*spec))
            ends_of[n] = _bitmap_ends(pasted[0]) + (begin + n) * stride
        ends += ends_of
    return encode_ends(_cancel_pairs(torch.cat(ends)), len(masks), spec.height * spec.width)


def encode_rle_padded_reference(
    masks: Tensor, boxes: Tensor, counts: Tensor | None, capacity: int, spec: RLESpec
) -> tuple[Tensor, Tensor]:
    """The strings of the first `counts[b]` of `[B, N]` masks that fit `capacity`, and the lengths of all."""
    batch, num_masks = masks.shape[:2]
    valid = torch.ones(batch, num_masks, dtype=torch.bool, device=masks.device)
    if counts is not None:
        valid = torch.arange(num_masks, device=masks.device) < counts[:, None]
    valid = valid.flatten()
    text, length = encode_rle_reference(masks.flatten(0, 1)[valid], boxes.flatten(0, 1)[valid], spec)
    if (length > capacity).any():
        text = text[(length <= capacity).repeat_interleave(length)]
    strings = text.new_zeros(batch * num_masks * capacity)
    strings[: len(text)] = text
    lengths = length.new_zeros(batch * num_masks)
    lengths[valid] = length
    return strings, lengths.view(batch, num_masks)


def _bitmap_ends(bitmap: Tensor) -> Tensor:
    """Positions of the pixels of a boolean `[H, W]` bitmap that differ from the pixel before, in column-major order.

    Most words of 8 pixels have none: they are found first.
    """
    height, width = bitmap.shape
    if not bitmap.numel():
        return torch.empty(0, dtype=torch.int64, device=bitmap.device)
    words = torch.zeros(-(-bitmap.numel() // 8), dtype=torch.int64, device=bitmap.device)
    flags = words.view(torch.bool)
    changes = flags[: bitmap.numel()].view(height, width)
    torch.ne(bitmap[1:], bitmap[:-1], out=changes[1:])
    torch.ne(bitmap[0, 1:], bitmap[-1, :-1], out=changes[0, 1:])
    changes[0, 0] = bitmap[0, 0]
    word = words.nonzero()[:, 0]
    place, byte = flags.view(-1, 8)[word].nonzero().unbind(1)
    pixel = word[place] * 8 + byte
    y = pixel // width
    return ((pixel - y * width) * height + y).sort().values


def encode_bitmaps_reference(bitmaps: Tensor) -> tuple[Tensor, Tensor]:
    """The strings of `[N, H, W]` bitmaps, one after the other, and their lengths."""
    count, height, width = bitmaps.shape
    stride = height * width + 1
    ends = [_bitmap_ends(bitmap.bool()) + n * stride for n, bitmap in enumerate(bitmaps)]
    empty = torch.empty(0, dtype=torch.int64, device=bitmaps.device)
    return encode_ends(torch.cat([empty, *ends]), count, height * width)
