"""Gradient of RoIAlign with respect to the features, without atomics: every pixel sums the gradients of its bins.

    grad_features[l][n, c, y, x] = sum over boxes k of level l and image n, and over bins (p, q)
                                   of Wy[k, y, p] * Wx[k, x, q] * grad[k, c, p, q]

The mean over a bin's samples is separable: Wy[k, y, p] is the total weight, over the samples of row p, of feature
row y, divided by their number. A program owns a tile of pixels and a block of channels of one image and level, and
walks the list of its windows of bins (`tile_lists.py`). For each window the program forms the [pixels x bins] matrix of
weights and adds its product with the [bins x channels] gradient.

Each gradient element is written once, in the features' precision, zeros included: no float32 copy of the
pyramid to zero, to add to and to cast (112 us of memory time on an H200 for the 45.7 MB pyramid of an 800 x 1344
image, against 27 us). Sums are float32 in the order of the boxes: same inputs, same bits. float16 and bfloat16
weights are rounded to that precision for the tensor cores; the products are exact and summed in float32.

The gradient of the maximum goes to the sample that won; there the weights depend on the channel, and the
product becomes a loop over the bins of the window.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    INTERPRETED,
    ceil_div,
    current_device,
    float_of,
    jit,
    next_power_of_2,
    on_device_of,
    target_backend,
    tl,
    triton,
    triton_dtype,
)
from fastmask.kernels.roi_align.level_lists import list_boxes_by_level
from fastmask.kernels.roi_align.levels import pyramid_numbers
from fastmask.kernels.roi_align.long_lists import (
    MAX_SEGMENTS,
    PIXELS_PER_STEP,
    SEGMENT,
    TILES_PER_STEP,
    segment_sums_kernel,
    sum_of_segments,
)
from fastmask.kernels.roi_align.tile_lists import (
    BOXES_PER_STEP,
    LIST_WARPS,
    TILE,
    WINDOW,
    list_windows_kernel,
    tile_at,
)
from fastmask.kernels.roi_align.windows import sum_windows

if TYPE_CHECKING:
    from fastmask.kernels.roi_align.op import PyramidShape, RoIAlignSpec

# By the bytes of an element. Half precision takes 256 channels, 128 sums per thread, where gradients are channels_last
# and all programs have 256: one program then builds the weights of a window, and 4 warps take 1,050 instructions per
# window, 8 warps 1,800. Elsewhere the masks and addresses of so many sums are spilled. Not yet measured on a GPU.
CHANNELS_PER_PROGRAM = {2: 64, 4: 64, 8: 32}
MANY_CHANNELS = 256
# Windows in the lists of all tiles together, in one set of launches; more take several.
MAX_LIST_ENTRIES = 1 << 26
NUM_WARPS = 4
NUM_STAGES = 3
# With 168 registers per thread three programs share an SM, with the 186 that the compiler takes only two. From sm_90 on
# that needs no spills for a fixed number of samples; on sm_80 it does.
MAX_REGISTERS = 168


@jit()
def _store(
    output,
    total,
    pixel,
    tile,
    channel,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Store sums `[pixels, channels]` of pixels of a tile, those that the level has."""
    row, column = tile.row + pixel // TILE, tile.column + pixel % TILE
    height, width, image = tile.height, tile.width, tile.image.to(tl.int64)
    if CHANNELS_LAST:
        place = (image * height * width + row.to(tl.int64) * width + column)[:, None] * C + channel[None, :]
    else:
        place = (image * C + channel)[None, :] * height * width + (row.to(tl.int64) * width + column)[:, None]
    inside = ((row < height) & (column < width))[:, None]
    if C % CHANNELS != 0:
        inside &= (channel < C)[None, :]
    tl.store(output + place, total.to(output.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["num_images", "first_tile"])
def _roi_align_backward_kernel(
    grad,  # [K, PH, PW, C]
    boxes,  # [K, 5] of COMPUTE
    argmax,  # [K, PH, PW, C] int32; read for the maximum only
    windows,
    starts,  # [tiles] int64
    counts,  # [tiles] int32
    workspace,  # [segments, TILE * TILE, C] of COMPUTE
    slots,  # [tiles] int32 and
    length,  # [1] int32, see `segment_sums_kernel`
    outputs,  # L of [N, H_l, W_l, C] or [N, C, H_l, W_l]
    first_tile,
    sizes,  # L packed (H_l, W_l)
    num_images,
    scales,  # L float64 bits
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    REDUCTION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # the outputs
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    PIXELS: tl.constexpr,  # of a split tile that are summed at a time
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,  # dtype of the product's factors
    PRECISION: tl.constexpr,
):
    tile = tile_at(first_tile + tl.program_id(0), sizes, num_images, TILE)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    output, scale = outputs[0], scales[0]
    for index in tl.static_range(1, len(sizes)):
        if tile.level == index:
            output, scale = outputs[index], scales[index]
    scale = float_of(scale, COMPUTE)

    count = tl.load(counts + tl.program_id(0))
    walked = count
    if count > SEGMENT:
        walked = tl.load(length)
    if count <= walked:
        windows += tl.load(starts + tl.program_id(0))
        total = sum_windows(
            grad,
            boxes,
            argmax,
            windows,
            count,
            tile,
            scale,
            channel,
            C,
            PH,
            PW,
            RATIO,
            ALIGNED,
            REDUCTION,
            COMPUTE,
            TILE,
            WINDOW,
            CHANNELS,
            PRODUCT,
            PRECISION,
        )
        _store(output, total, tl.arange(0, TILE * TILE), tile, channel, C, CHANNELS_LAST, TILE, CHANNELS)
    else:
        slot, segments = tl.load(slots + tl.program_id(0)), tl.cdiv(count, walked)
        for first_pixel in range(0, TILE * TILE, PIXELS):
            pixel = first_pixel + tl.arange(0, PIXELS)
            total = sum_of_segments(workspace, slot, segments, pixel, channel, C, COMPUTE, TILE, PIXELS, CHANNELS)
            _store(output, total, pixel, tile, channel, C, CHANNELS_LAST, TILE, CHANNELS)


# Triton 3.6 interprets a bfloat16 product wrongly.
_PRODUCT_DTYPE = triton and {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,
}


def _channels_per_program(channels: int, dtype: torch.dtype, channels_last: bool) -> int:
    if dtype.itemsize == 2 and channels_last and channels % MANY_CHANNELS == 0:
        return MANY_CHANNELS
    return min(CHANNELS_PER_PROGRAM[dtype.itemsize], max(next_power_of_2(channels), 16))


def _register_limit(spec: RoIAlignSpec, block: int) -> dict[str, int]:
    """Triton's option `maxnreg`, where `MAX_REGISTERS` is enough."""
    if target_backend() != "cuda" or block != MANY_CHANNELS:
        return {}
    hopper = triton.runtime.driver.active.get_current_target().arch >= 90
    return {"maxnreg": MAX_REGISTERS} if hopper and spec.reduction == "mean" and 0 < spec.sampling_ratio <= 3 else {}


class _Launches(NamedTuple):
    """The launches of a pyramid, and how it is divided."""

    list_windows: Launch
    sum_segments: Launch
    sum_tiles: Launch
    tiles: int
    max_tiles: int  # of one image and level
    blocks: int  # of channels
    windows_per_box: int


@lru_cache(maxsize=1024)
def _prepared(
    spec: RoIAlignSpec,
    shape: PyramidShape,
    channels: int,
    dtype: torch.dtype,
    channels_last: bool,
    device: Any,  # the current one, as Triton names it
    segment: int,
    boxes_per_step: int,
) -> _Launches:
    del device  # the settings depend on its architecture
    per_image = [ceil_div(height, TILE) * ceil_div(width, TILE) for height, width in shape.levels]
    block = _channels_per_program(channels, dtype, channels_last)
    pyramid = pyramid_numbers(spec, shape.num_images, shape.levels)
    geometry = {
        "PH": spec.pooled_height,
        "PW": spec.pooled_width,
        "RATIO": max(spec.sampling_ratio, 0),
        "ALIGNED": spec.aligned,
        "COMPUTE": triton_dtype(dtype),
        "TILE": TILE,
        "WINDOW": WINDOW,
        "enable_fp_fusion": False,
    }
    sums = {
        "C": channels,
        "REDUCTION": spec.reduction,
        "SEGMENT": segment,
        "CHANNELS": block,
        "PRODUCT": _PRODUCT_DTYPE[dtype],
        "PRECISION": "tf32x3" if dtype == torch.float32 and target_backend() == "cuda" else "ieee",
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
        **geometry,
    }
    return _Launches(
        Launch(list_windows_kernel, *pyramid, STEP=boxes_per_step, num_warps=LIST_WARPS, **geometry),
        Launch(segment_sums_kernel, *pyramid, STEP=TILES_PER_STEP, **sums),
        Launch(
            _roi_align_backward_kernel,
            *pyramid,
            CHANNELS_LAST=channels_last,
            PIXELS=PIXELS_PER_STEP,
            **_register_limit(spec, block),
            **sums,
        ),
        tiles=sum(per_image) * shape.num_images,
        max_tiles=max(per_image),
        blocks=ceil_div(channels, block),
        windows_per_box=ceil_div(spec.pooled_height, WINDOW) * ceil_div(spec.pooled_width, WINDOW),
    )


def launch_roi_align_backward(
    grad: Tensor, boxes: Tensor, argmax: Tensor, shape: PyramidShape, channels_last: bool, spec: RoIAlignSpec
) -> list[Tensor]:
    """Gradients of the levels."""
    grads = shape.empty_features(grad, channels_last)
    if any(output.numel() for output in grads):
        with on_device_of(boxes):
            _launch(grads, grad, boxes, argmax, shape, channels_last, spec)
    return grads


def _launch(
    grads: list[Tensor],
    grad: Tensor,
    boxes: Tensor,
    argmax: Tensor,
    shape: PyramidShape,
    channels_last: bool,
    spec: RoIAlignSpec,
) -> None:
    channels, num_boxes, device = grad.shape[1], boxes.shape[0], boxes.device
    prepared = _prepared(spec, shape, channels, grad.dtype, channels_last, current_device(), SEGMENT, BOXES_PER_STEP)
    boxes = boxes.contiguous()
    grad = grad.contiguous(memory_format=torch.channels_last)
    argmax = argmax.contiguous(memory_format=torch.channels_last)
    entries = num_boxes * prepared.windows_per_box
    max_tiles, step = prepared.max_tiles, prepared.tiles
    if max_tiles * entries > MAX_LIST_ENTRIES:
        max_tiles = step = max(1, MAX_LIST_ENTRIES // entries)
    narrow = (num_boxes + 1) * spec.pooled_height * spec.pooled_width < 2**31
    windows = torch.empty(max_tiles * entries, dtype=torch.int32 if narrow else torch.int64, device=device)
    starts = torch.empty(step, dtype=torch.int64, device=device)
    counts = torch.empty(step, dtype=torch.int32, device=device)
    by_level, level_counts = list_boxes_by_level(
        boxes, shape.num_images, len(shape.levels), spec.thresholds(boxes.dtype)
    )
    segments = MAX_SEGMENTS if entries > SEGMENT else 0  # shorter lists are never split
    workspace = torch.empty(segments * TILE * TILE * channels, dtype=boxes.dtype, device=device)
    slots = torch.empty(step, dtype=torch.int32, device=device)
    length = torch.empty(1, dtype=torch.int32, device=device)
    lists = grad, boxes, argmax, windows, starts, counts, workspace, slots, length
    outputs = tuple(grads)
    for first_tile in range(0, prepared.tiles, step):
        in_launch = min(step, prepared.tiles - first_tile)
        prepared.list_windows(
            (in_launch,), boxes, by_level, level_counts, windows, starts, counts, num_boxes, first_tile, max_tiles
        )
        if segments:
            prepared.sum_segments((segments, prepared.blocks), *lists, in_launch, first_tile)
        prepared.sum_tiles((in_launch, prepared.blocks), *lists, outputs, first_tile)
