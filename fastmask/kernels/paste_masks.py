"""Mask paste-back: m x m masks, predicted inside their boxes, resampled onto the image.

    p[n, y, x] = bilinear(masks[n], v, u)        out = p >= threshold, or p itself
    u = (x + 1/2 - x1) * m / (x2 - x1) - 1/2     v = (y + 1/2 - y1) * m / (y2 - y1) - 1/2

and the mask counts as 0 outside its pixels (He et al. 2017, §3.1, Inference).

N masks, m their side, H x W the image. Coordinates are continuous: pixel (i, j) covers [j, j+1) x [i, i+1),
so its centre lies at +1/2, and a box [x1, y1, x2, y2] is in the image's pixels. This is
`grid_sample(align_corners=False, padding_mode="zeros")` over the box, and what detectron2 pastes. torchvision
pads the mask by a pixel, expands the box likewise, and truncates it to whole pixels. As the padding is the
zeros that surround the mask anyway, that is the same formula over another span:

    x1, x2 <- trunc(x1'), trunc(x2') + 1         u = (x + 1/2 - x1) * (m + 2) / (x2 - x1) - 3/2

One launch writes each output byte once. Sampling every mask over the whole image instead moves about 40
bytes per pixel and mask through memory: 4 GB for 100 masks at 800 x 1333, whose output is 107 MB.
Deterministic: no atomics, one writer per element.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._mask_sampling import (
    CONVENTIONS,
    check_placed_masks,
    hat_weights,
    mask_coordinate,
    mask_scale,
    pixel_positions,
    place_masks,
    reached_axis,
)
from fastmask.kernels._runtime import (
    Size,
    ceil_div,
    compute_dtype,
    float64_bits,
    float_of,
    jit,
    on_device_of,
    overridable,
    register,
    tl,
    triton_dtype,
)
from fastmask.kernels._validation import check_choice, check_fraction

# Masks whose weights, at most (H + W) * m each, the reference holds at a time.
REFERENCE_MASKS = 64

# A tile is a vector of 16 bytes for each thread of a warp. 100 boxes of COCO's sizes at 800 x 1333 touch vectors for
# 15,247 passes of a warp: 0.6 for each program, at most 9. Larger programs would amortize 150 instructions before the
# first store, but lengthen the longest chain. One warp needs no barrier to reduce. Compiled: 64 registers on sm_80 and
# sm_90, 66 on sm_100, 57 on gfx942, no spills. Not yet measured on a GPU.
NUM_WARPS = 1
TILES_PER_PROGRAM = 8
_INTEGERS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}  # by bytes


class PasteSpec(NamedTuple):
    """The settings of `paste_masks`, as its public function documents them."""

    height: Size
    width: Size
    threshold: float | None
    convention: str


def paste_masks_reference(masks: Tensor, boxes: Tensor, spec: PasteSpec) -> Tensor:
    """Separable form, `Wy @ mask @ Wx.T` with hat-function weights, only where the mask reaches."""
    m, dtype, threshold = masks.shape[-1], compute_dtype(masks.dtype), spec.threshold
    size = len(masks), spec.height, spec.width
    out = masks.new_zeros(size) if threshold is None else masks.new_full(size, threshold <= 0, dtype=torch.bool)
    placement, masks = place_masks(boxes, m, dtype, spec.height, spec.width, spec.convention), masks.to(dtype)
    corners = torch.cat([placement.first, placement.last], 1).tolist()
    for begin in range(0, len(masks), REFERENCE_MASKS):
        some = placement.group(begin, begin + REFERENCE_MASKS)
        weights = []  # of many boxes at once: computed per box, they cost more than the products
        for axis in range(2):
            _, _, position, count = pixel_positions(some, axis)
            weights.append(hat_weights(position, m).split(count))
        # A loop, because the boxes' areas differ a thousandfold; most of the time goes into filling the output.
        for n, (columns, rows) in enumerate(zip(*weights, strict=True), begin):
            left, top, right, bottom = corners[n]
            if left < right and top < bottom:
                value = rows @ (masks[n] @ columns.T)
                region = out[n, top:bottom, left:right]
                region.copy_(value) if threshold is None else torch.ge(value, threshold, out=region)
    return out


@jit()
def _words_of(out, vector, words):
    """Pointers to the words of vectors of the output. Multiples, so that a thread stores 16 bytes at once."""
    WORDS: tl.constexpr = words.shape[1]
    return out.to(tl.pointer_type(words.dtype)) + vector[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@jit()
def _store_vectors(out, begin, pixels, first, words, selected):
    """Store selected vectors that begin at pixels `first` of the mask at `out + begin`, and nothing outside it."""
    BITS: tl.constexpr = out.dtype.element_ty.primitive_bitwidth
    PER_WORD: tl.constexpr = words.dtype.primitive_bitwidth // BITS
    PER_VECTOR: tl.constexpr = 128 // BITS
    whole = (first >= 0) & (first <= pixels - PER_VECTOR)
    tl.store(_words_of(out, (begin + first) // PER_VECTOR, words), words, mask=(selected & whole)[:, None])
    partial = selected & ~whole
    if tl.max(partial.to(tl.int32), 0) > 0:
        for i in range(PER_WORD):
            pixel = first[:, None] + tl.arange(0, words.shape[1])[None, :] * PER_WORD + i
            inside = partial[:, None] & (pixel >= 0) & (pixel < pixels)
            tl.store(out + begin + pixel, (words >> (i * BITS)).to(out.dtype.element_ty), mask=inside)


@jit()
def _fill(out, begin, pixels, width, left, top, right, bottom, offset, words, TILES: tl.constexpr):
    """Store `words` in the vectors that the box does not touch, of the tiles that begin at pixel `offset` of a mask."""
    PER_VECTOR: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    VECTORS: tl.constexpr = words.shape[0]
    TILE_SIZE: tl.constexpr = VECTORS * PER_VECTOR
    end = offset + TILES * TILE_SIZE
    before, after = end <= top * width + left, offset >= bottom * width
    if (before | after) & (offset >= 0) & (end <= pixels):
        word = _words_of(out, (begin + offset) // TILE_SIZE * VECTORS + tl.arange(0, VECTORS), words)
        for i in tl.static_range(TILES):
            tl.store(word + i * (VECTORS * words.shape[1]), words)
    else:
        end = tl.minimum(end, pixels)
        while offset < end:
            first = offset + tl.arange(0, VECTORS) * PER_VECTOR
            # The last row whose part of the box begins before the vector's end. Unsigned: the sum may reach 2^31.
            y = (first + (PER_VECTOR - 1 - left) + width).to(tl.uint32) // width.to(tl.uint32)
            y = tl.minimum(y.to(tl.int32), bottom) - 1
            touched = (y >= top) & (y * width + right > first)
            _store_vectors(out, begin, pixels, first, words, ~touched)
            offset += TILE_SIZE


@jit(do_not_specialize=["programs_per_mask", "height", "width", "threshold_bits"])
def _paste_masks_kernel(
    masks,  # [N, m, m]
    boxes,  # [N, 4], float32 or float64
    out,  # [N, H, W], as unsigned integers
    programs_per_mask,
    height,
    width,
    threshold_bits,
    M: tl.constexpr,
    PADDING: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    VECTORS: tl.constexpr,  # of 16 bytes, in a tile
    TILES: tl.constexpr,  # of a program
    COMPUTE: tl.constexpr,
):
    # A vector is an aligned run of 16 bytes of the output in memory order. Each program of a mask fills those of up to
    # TILES aligned tiles that the box does not touch. Those that the box touches are divided evenly among the programs:
    # no thread is idle, wherever the box lies. Masks share their first and last vector with their neighbours.
    BITS: tl.constexpr = out.dtype.element_ty.primitive_bitwidth
    PER_VECTOR: tl.constexpr = 128 // BITS
    PER_WORD: tl.constexpr = (BITS + 31) // BITS
    WORDS: tl.constexpr = PER_VECTOR // PER_WORD
    TILE_SIZE: tl.constexpr = VECTORS * PER_VECTOR
    word_type = tl.uint64 if BITS == 64 else tl.uint32

    n = tl.program_id(0) // programs_per_mask
    program = tl.program_id(0) - n * programs_per_mask
    pixels = height * width
    begin = n.to(tl.int64) * pixels
    skew = (begin % TILE_SIZE).to(tl.int32)  # pixels of the mask are counted from its first, tiles start before it

    box = boxes + n.to(tl.int64) * 4
    x1, y1, x2, y2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    x1, x2, left, right = reached_axis(x1, x2, width.to(x1.dtype), M, PADDING)
    y1, y2, top, bottom = reached_axis(y1, y2, height.to(y1.dtype), M, PADDING)
    rows = tl.where(left < right, tl.maximum(bottom - top, 0), 0)
    threshold = float_of(threshold_bits, COMPUTE)
    unreached = ((threshold <= 0) & (not PROBABILITIES)).to(word_type)

    empty = tl.full((VECTORS, WORDS), unreached * 0x01010101, word_type)
    _fill(out, begin, pixels, width, left, top, right, top + rows, program * (TILES * TILE_SIZE) - skew, empty, TILES)

    per_row = (right - left + PER_VECTOR - 2) // PER_VECTOR + 1  # vectors that a row of the box touches, at most
    total = per_row * rows
    share = (total + programs_per_mask * VECTORS - 1) // (programs_per_mask * VECTORS) * VECTORS
    item = program * share
    last_item = tl.minimum(item + share, total)
    if item < last_item:
        x_start, x_scale = x1.to(COMPUTE), mask_scale(x1, x2, M, PADDING, COMPUTE)
        y_start, y_scale = y1.to(COMPUTE), mask_scale(y1, y2, M, PADDING, COMPUTE)
        mask = masks + n.to(tl.int64) * (M * M)
        while item < last_item:
            index = tl.minimum(item + tl.arange(0, VECTORS), last_item - 1)
            row = (index.to(tl.uint32) // per_row.to(tl.uint32)).to(tl.int32)
            y = top + row
            line = y * width
            first = ((line + left + skew) // PER_VECTOR + (index - row * per_row)) * PER_VECTOR - skew
            selected = (item + tl.arange(0, VECTORS) < last_item) & (first < line + right)
            selected &= (row == 0) | (first > line - width + right - 1)  # else it belongs to the row above
            words = empty
            remaining = 1
            while remaining > 0:  # once, unless a vector reaches from the right side of the box to its left side
                r, dv = mask_coordinate(y, y_start, y_scale, M, PADDING)
                upper_weight = tl.where((r >= 0) & (r < M), 1 - dv, 0.0)[:, None]
                lower_weight = tl.where(r < M - 1, dv, 0.0)[:, None]
                upper_row = (tl.minimum(tl.maximum(r, 0), M - 1) * M)[:, None]
                lower_row = (tl.minimum(r + 1, M - 1) * M)[:, None]
                x_end = tl.where(y < top + rows, right, left)[:, None]
                x = (first - line)[:, None] + tl.arange(0, WORDS)[None, :] * PER_WORD
                # One element of every word at a time: all 16 of a thread at once take more registers.
                for i in range(PER_WORD):
                    c, du = mask_coordinate(x, x_start, x_scale, M, PADDING)
                    c0, c1 = (c >= 0) & (c < M), c < M - 1
                    p00 = tl.load(mask + upper_row + c, mask=c0, other=0.0).to(COMPUTE)
                    p01 = tl.load(mask + upper_row + c + 1, mask=c1, other=0.0).to(COMPUTE)
                    p10 = tl.load(mask + lower_row + c, mask=c0, other=0.0).to(COMPUTE)
                    p11 = tl.load(mask + lower_row + c + 1, mask=c1, other=0.0).to(COMPUTE)
                    upper, lower = tl.fma(du, p01 - p00, p00), tl.fma(du, p11 - p10, p10)
                    value = tl.fma(lower_weight, lower, upper_weight * upper)
                    if PROBABILITIES:
                        result = value.to(masks.dtype.element_ty).to(out.dtype.element_ty, bitcast=True).to(word_type)
                    else:
                        result = (value >= threshold).to(word_type) ^ unreached
                    words ^= tl.where((x >= left) & (x < x_end), result, 0) << (i * BITS)
                    x += 1
                y += 1
                line += width
                below = selected & (y < top + rows) & (line + left < first + PER_VECTOR)
                remaining = tl.max(below.to(tl.int32), 0)
            _store_vectors(out, begin, pixels, first, words, selected)
            item += VECTORS


@lru_cache(maxsize=1024)
def _prepared(spec: PasteSpec, m: int, dtype: torch.dtype) -> tuple[int, Launch]:
    """The number of programs for each mask, and the launch."""
    size = dtype.itemsize if spec.threshold is None else 1
    vectors = NUM_WARPS * 32
    tiles = ceil_div(spec.height * spec.width - 1, vectors * 16 // size) + 1  # at most this many overlap a mask
    programs_per_mask = ceil_div(tiles, TILES_PER_PROGRAM)
    return programs_per_mask, Launch(
        _paste_masks_kernel,
        programs_per_mask,
        spec.height,
        spec.width,
        float64_bits(spec.threshold or 0.0),
        M=m,
        PADDING=int(spec.convention == "torchvision"),
        PROBABILITIES=spec.threshold is None,
        VECTORS=vectors,
        TILES=TILES_PER_PROGRAM,
        COMPUTE=triton_dtype(dtype),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def _launch_paste_masks(masks: Tensor, boxes: Tensor, spec: PasteSpec) -> Tensor:
    n, m, _ = masks.shape
    dtype = masks.dtype if spec.threshold is None else torch.bool
    out = torch.empty((n, spec.height, spec.width), dtype=dtype, device=masks.device)
    if not out.numel():
        return out
    programs_per_mask, launch = _prepared(spec, m, masks.dtype)
    boxes = boxes if boxes.itemsize >= 4 else boxes.float()
    with on_device_of(masks):
        launch((n * programs_per_mask,), masks.contiguous(), boxes.contiguous(), out.view(_INTEGERS[out.itemsize]))
    return out


def _fake_paste_masks(masks: Tensor, _boxes: Tensor, spec: PasteSpec) -> Tensor:
    dtype = masks.dtype if spec.threshold is None else torch.bool
    return masks.new_empty(len(masks), spec.height, spec.width, dtype=dtype)


_paste_masks = register(
    "paste_masks(Tensor masks, Tensor boxes, *spec) -> Tensor",
    reference=paste_masks_reference,
    launch=_launch_paste_masks,
    fake=_fake_paste_masks,
    spec=PasteSpec,
)


@overridable
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float | None = 0.5,
    *,
    convention: str = "aligned",
) -> Tensor:
    """Paste predicted masks into the image.

    Args:
        masks: `[N, m, m]`, floating, mask probabilities inside each box.
        boxes: `[N, 4]`, floating, `(x1, y1, x2, y2)` in image pixels.
        image_size: `(height, width)` of the image, at most 2^30 pixels.
        threshold: a pixel belongs to the mask if its interpolated probability is at least this, a number in
            [0, 1]; None returns the probabilities. They are 0 where the mask does not reach.
        convention: `"aligned"` samples at pixel centres over the box itself, as detectron2 does;
            `"torchvision"` gives the numbers of torchvision's `paste_masks_in_image`.

    Returns:
        `[N, height, width]`, boolean masks, or probabilities in the dtype of `masks`; computed in float32
        (float64 for float64 masks), and without a gradient.
        A box that is empty or inverted, or has a coordinate that is not finite or at least 2^31 in magnitude,
        pastes probability 0 everywhere. With `"torchvision"` an empty box covers one pixel, as it does there.

    Raises:
        ValueError: `masks` or `boxes` has another shape or they are on two devices, the image has a negative
            side or too many pixels, `threshold` is outside [0, 1], or `convention` is unknown.
        TypeError: `masks` or `boxes` is not a dense floating tensor, `image_size` is not two ints, `threshold` is
            not a number, or `convention` is not a string.

    Source: He et al. 2017, Mask R-CNN, §3.1.
    """
    height, width = check_placed_masks(masks, boxes, image_size)
    threshold = None if threshold is None else check_fraction("threshold", threshold)
    convention = check_choice("convention", convention, CONVENTIONS)
    # Detached: the operator has no gradient, and its probabilities must not claim to have one.
    return _paste_masks(masks.detach(), boxes.detach(), *PasteSpec(height, width, threshold, convention))
