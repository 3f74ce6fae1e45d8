"""Where a mask of m x m pixels lies in the image, and how it is interpolated: shared by the operators that place masks.

`paste_masks` has the formulas and both conventions. A reference and a kernel each have one spelling of every rounded
operation, here, so that operators agree to the bit about each pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import divide, jit, tl
from fastmask.kernels._validation import check_pair, check_same_device, check_tensor

CONVENTIONS = ("aligned", "torchvision")

# Pixels of a mask are counted in 32 bits, with room for one row more.
MAX_PIXELS = 2**30


def mask_span(boxes: Tensor, m: int, convention: str) -> tuple[Tensor, Tensor, Tensor]:
    """First and last (x, y) that the mask is stretched over, `[N, 2]` each, and whether they are usable, `[N, 1]`."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    start, end = boxes[:, :2], boxes[:, 2:]
    if convention == "torchvision":  # its operations in its order: another rounding could truncate differently
        half, centre = (end - start) * 0.5 * ((m + 2) / m), (end + start) * 0.5
        start, end = (centre - half).trunc(), (centre + half).trunc() + 1
    usable = (boxes.abs() < 2.0**31).all(1) & (start < end).all(1)
    return start, end, usable[:, None]


class Placement(NamedTuple):
    """Where N masks lie, along x and y: `[N, 2]` each."""

    first: Tensor  # int64, the first pixel of the image that the mask reaches
    last: Tensor  # int64, one beyond its last pixel
    start: Tensor  # where its span begins
    scale: Tensor  # mask pixels per image pixel
    padding: int  # pixels of zeros on each side of the mask

    def group(self, begin: int, end: int) -> Placement:
        """Of the masks begin .. end - 1."""
        some = slice(begin, end)
        return Placement(self.first[some], self.last[some], self.start[some], self.scale[some], self.padding)


def place_masks(boxes: Tensor, m: int, dtype: torch.dtype, height: int, width: int, convention: str) -> Placement:
    """Where masks of `[N, 4]` boxes lie; the dtype is that of coordinates."""
    padding = int(convention == "torchvision")
    start, end, usable = mask_span(boxes, m, convention)
    reach = (1 - padding) * (end - start) / (2 * m)  # a mask pixel's influence ends half a pixel beyond it
    image = torch.tensor([width, height], device=boxes.device)
    first = (start - reach).where(usable, 0).floor().clamp(min=0).minimum(image).long()
    last = (end + reach).where(usable, 0).ceil().clamp(min=0).minimum(image).long().maximum(first)
    start, end = start.to(dtype), end.to(dtype)
    return Placement(first, last, start, (m + 2 * padding) / (end - start), padding)


def mask_position(pixel: Tensor, start: Tensor, scale: Tensor, padding: int) -> Tensor:
    """u at the centre of each pixel."""
    return (pixel.to(start.dtype) + 0.5 - start) * scale - (0.5 + padding)


def pixel_positions(placement: Placement, axis: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The pixels that each mask reaches along an axis, one mask after the other.

    Returns:
        `[P]` each: the mask, the pixel, and its position in the mask; and for each mask the number of its pixels.
    """
    last = placement.last[:, axis]
    count = last - placement.first[:, axis]
    mask = torch.repeat_interleave(count)
    pixel = torch.arange(len(mask), device=mask.device) - (count.cumsum(0) - last)[mask]
    position = mask_position(pixel, placement.start[mask, axis], placement.scale[mask, axis], placement.padding)
    return mask, pixel, position, count.tolist()


def hat_weights(position: Tensor, m: int) -> Tensor:
    """Bilinear weights `[..., m]` of m mask pixels at positions `[...]` in mask coordinates."""
    distance = position[:, None] - torch.arange(m, dtype=position.dtype, device=position.device)
    return distance.abs_().neg_().add_(1).clamp_(min=0)


@jit()
def _truncate(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@jit()
def reached_axis(start, end, size, M: tl.constexpr, PADDING: tl.constexpr):
    """Along one axis: the span that the mask is stretched over, and the pixels [first, last) it reaches, if any."""
    usable = (tl.abs(start) < 2.0**31) & (tl.abs(end) < 2.0**31)
    start, end = tl.where(usable, start, 0.0), tl.where(usable, end, 0.0)
    if PADDING:
        half, centre = (end - start) * 0.5 * ((M + 2) / M), (end + start) * 0.5
        start, end = _truncate(centre - half), _truncate(centre + half) + 1
    usable = usable & (start < end)
    reach = (end - start) * ((1 - PADDING) * 0.5 / M)
    first = tl.minimum(tl.maximum(tl.floor(start - reach), 0.0), size)
    last = tl.minimum(tl.maximum(tl.ceil(end + reach), 0.0), size)
    last = tl.where(usable, last, 0.0)
    return start, end, first.to(tl.int32), last.to(tl.int32)


@jit()
def mask_scale(start, end, M: tl.constexpr, PADDING: tl.constexpr, COMPUTE: tl.constexpr):
    """Mask pixels per image pixel, along one axis of a box that reaches the image."""
    extent = tl.maximum(end.to(COMPUTE) - start.to(COMPUTE), 1e-30)  # so that no scale is infinite
    return divide(tl.full((), M + 2 * PADDING, COMPUTE), extent)


@jit()
def mask_coordinate(pixel, start, scale, M: tl.constexpr, PADDING: tl.constexpr):
    """u at the centre of a pixel, as its floor and the fraction; no mask pixel lies beyond [-1, M]."""
    u = tl.fma(pixel.to(start.dtype) + 0.5 - start, scale, -0.5 - PADDING)
    u = tl.minimum(tl.maximum(u, -1.0), M)
    floor = tl.floor(u).to(tl.int32)
    return floor, u - floor.to(u.dtype)


def check_placed_masks(masks: Any, boxes: Any, image_size: Any, lead: str = "N") -> tuple[int, int]:
    """The image's sides, if masks and boxes match: `[N, m, m]` and `[N, 4]`, or more dimensions in `lead`."""
    check_tensor("masks", masks, floating=True)
    check_tensor("boxes", boxes, floating=True)
    leading = lead.count(",") + 1
    if masks.ndim != leading + 2 or masks.shape[-2] != masks.shape[-1] or masks.shape[-1] == 0:
        raise ValueError(f"masks: expected [{lead}, m, m], got {list(masks.shape)}")
    expected = [*masks.shape[:leading], 4]
    if list(boxes.shape) != expected:
        raise ValueError(f"boxes: expected {expected} to match masks, got {list(boxes.shape)}")
    check_same_device("boxes", boxes, "masks", masks)
    height, width = check_pair("image_size", image_size)
    if height < 0 or width < 0 or height * width > MAX_PIXELS:
        raise ValueError(f"image_size: expected sides >= 0 and at most 2^30 pixels, got {(height, width)}")
    return height, width
