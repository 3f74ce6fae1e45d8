"""COCO's run-length encoding of predicted masks, from m x m probabilities to compressed strings, without pasting them.

    p[n, y, x] = paste_masks(masks, boxes)[n, y, x]                 boolean
    runs[n] = lengths of the runs of equal p[n], column by column, the first one of zeros (it may be empty)
    delta[i] = runs[i] - runs[i - 2] for i > 2, otherwise runs[i]
    text[n] = delta in groups of 5 bits, lowest first, as many as hold the number and its sign; bit 5 of each group
              says that another one follows; plus 48, which makes it printable

He et al. 2017, §3.1 (Inference), up to the format in which COCO's evaluation and its servers take masks. The strings
are those of pycocotools' `mask.encode`, byte by byte, of the masks that `paste_masks` gives on the same device.

N masks, m their side, H x W the image, x * H + y the position of a pixel. Coordinates and conventions are those of
`paste_masks`.

Pasting writes N x H x W bytes (107 MB for 100 masks at 800 x 1333), of which the peers copy every one to the host and
read them there. Here a pixel becomes one bit inside the box alone, in a program's registers, and about 100 kB of text
leave the device. Deterministic: no atomics, one writer per element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._mask_sampling import CONVENTIONS, MAX_PIXELS, check_placed_masks
from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import (
    MAX_INT32,
    check_choice,
    check_counts_dtype,
    check_fraction,
    check_int,
    check_same_device,
    check_tensor,
    describe,
)
from fastmask.kernels.encode_rle.op import encode_bitmaps_op, encode_rle_op, encode_rle_padded_op
from fastmask.kernels.encode_rle.reference import RLESpec
from fastmask.kernels.encode_rle.text import split_text

RLE = dict[str, Any]  # {"size": [H, W], "counts": text}


@overridable
def encode_rle(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    *,
    convention: str = "aligned",
) -> list[RLE]:
    """Encode predicted masks in COCO's run-length encoding, as if they were pasted into the image.

    Args:
        masks: `[N, m, m]`, floating, mask probabilities inside each box.
        boxes: `[N, 4]`, floating, `(x1, y1, x2, y2)` in image pixels.
        image_size: `(height, width)` of the image, at most 2^30 pixels.
        threshold: a pixel belongs to the mask if its interpolated probability is at least this, a number in [0, 1].
        convention: `"aligned"` or `"torchvision"`, as in `paste_masks`.

    Returns:
        For each mask `{"size": [height, width], "counts": text}`: what pycocotools' `mask.encode` gives for
        `paste_masks(masks, boxes, image_size, threshold, convention=convention)`, with the text as `str`. Degenerate
        and non-finite boxes are treated as there. On an accelerator the call synchronises once, at the end, to copy
        the strings; a second time if some are longer than usual.

    Raises:
        ValueError: `masks` or `boxes` has another shape or they are on two devices, the image has a negative
            side or too many pixels, `threshold` is outside [0, 1], or `convention` is unknown.
        TypeError: `masks` or `boxes` is not a dense floating tensor, `image_size` is not two ints, `threshold` is
            not a number, or `convention` is not a string.

    Source: He et al. 2017, Mask R-CNN, §3.1; COCO's `maskApi.c` for the format.
    """
    height, width = check_placed_masks(masks, boxes, image_size)
    spec = _spec(height, width, threshold, convention)
    strings, lengths = encode_rle_op(masks.detach(), boxes.detach(), *spec)
    return _as_dicts(strings, lengths, height, width)


@overridable
def encode_rle_padded(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    *,
    convention: str = "aligned",
    counts: Tensor | None = None,
    capacity: int = 8192,
) -> tuple[Tensor, Tensor]:
    """`encode_rle` with results of fixed shape, which stay on the device: it never synchronises.

    Args:
        masks: `[B, N, m, m]`, floating, mask probabilities inside each box.
        boxes: `[B, N, 4]`, floating, `(x1, y1, x2, y2)` in image pixels.
        image_size: `(height, width)` of all B images, at most 2^30 pixels.
        threshold, convention: as in `encode_rle`.
        counts: `[B]`, signed integers or uint8; the first `counts[b]` masks of image b, clamped to [0, N], are
            encoded. The strings of the others are empty.
        capacity: bytes for the string of one mask. B * N * capacity < 2^31.

    Returns:
        `[B * N * capacity]` uint8, the strings in ASCII, one after the other without gaps, then zeros: to copy the
        first bytes of it to the host is enough. And `[B, N]` int64, the length of each string. A string longer than
        `capacity` is left out; its place has no bytes, and its `length > capacity` is at least what it needs: a call
        with that capacity holds it.

    Raises:
        ValueError: as `encode_rle`; or `counts` does not match, or `capacity` is not positive or too large.
        TypeError: as `encode_rle`; or `counts` is not a dense tensor of integers of up to 64 bits, or `capacity` is
            not an int.
    """
    height, width = check_placed_masks(masks, boxes, image_size, "B, N")
    spec = _spec(height, width, threshold, convention)
    batch, num_masks = masks.shape[:2]
    if counts is not None:
        check_counts_dtype("counts", counts)
        if counts.shape != (batch,):
            raise ValueError(f"counts: expected [{batch}] to match masks, got {list(counts.shape)}")
        check_same_device("counts", counts, "masks", masks)
    capacity = check_int("capacity", capacity, least=1, most=MAX_INT32 // max(1, batch * num_masks))
    return encode_rle_padded_op(masks.detach(), boxes.detach(), counts, capacity, *spec)


@overridable
def encode_bitmaps(bitmaps: Tensor) -> list[RLE]:
    """Encode bitmaps of whole images in COCO's run-length encoding.

    Args:
        bitmaps: `[N, H, W]`, bool or uint8, at most 2^30 pixels each. Pixels that are not 0 belong to the mask.

    Returns:
        For each bitmap `{"size": [H, W], "counts": text}`, as pycocotools' `mask.encode` gives, with the text as
        `str`. On an accelerator the call synchronises, as `encode_rle` does.

    Raises:
        ValueError: `bitmaps` has another shape or too many pixels.
        TypeError: `bitmaps` is not a dense tensor of bool or uint8.

    Source: COCO's `maskApi.c`.
    """
    check_tensor("bitmaps", bitmaps)
    if bitmaps.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"bitmaps: expected bool or uint8, got {describe(bitmaps)}")
    if bitmaps.ndim != 3:
        raise ValueError(f"bitmaps: expected [N, H, W], got {list(bitmaps.shape)}")
    _, height, width = bitmaps.shape
    if height * width > MAX_PIXELS:
        raise ValueError(f"bitmaps: expected at most 2^30 pixels each, got {list(bitmaps.shape)}")
    strings, lengths = encode_bitmaps_op(bitmaps)
    return _as_dicts(strings, lengths, height, width)


def _spec(height: int, width: int, threshold: float, convention: str) -> RLESpec:
    threshold = check_fraction("threshold", threshold)
    return RLESpec(height, width, threshold, check_choice("convention", convention, CONVENTIONS))


def _as_dicts(strings: Tensor, lengths: Tensor, height: int, width: int) -> list[RLE]:
    return [{"size": [height, width], "counts": text} for text in split_text(strings, lengths)]
