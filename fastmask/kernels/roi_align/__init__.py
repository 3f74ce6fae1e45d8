"""RoIAlign over a feature pyramid: level assignment, sampling and pooling in one launch (He et al. 2017, §3).

    output[k, c, p, q] = mean or max over samples (i, j) of bilinear(features[level(k)][image(k), c], y, x)
    y = start_y + p * bin_y + (i + 1/2) * bin_y / grid_y        x likewise

K boxes `[image, x1, y1, x2, y2]`, L levels `[N, C, H_l, W_l]`, PH x PW bins. Boxes are in image pixels and
`spatial_scales[l]` maps them to level l; `roi_sampling.py` has the geometry, `fpn_levels.py` the level. RoIAlign
on a single feature map is the case L = 1.

Fused: levels are chosen inside the kernel, so nothing waits for the host and no box is moved; features are read
in their own precision, channels innermost, 16 bytes a thread. Casting an 800 x 1344 pyramid to float32 first, as
the peers do under autocast, would alone write 91 MB. Features that are not channels_last are transposed once: a
scattered 2-byte load costs a whole 32-byte sector, and 16 are needed per output. Sums are float32 (float64 for
float64 features), in a fixed order: same inputs, same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._rois import checked_features, checked_output_size, checked_scales, empty_pooled, roi_format
from fastmask.kernels._runtime import (
    divide,
    float64_bits,
    float_of,
    is_channels_last,
    jit,
    on_device_of,
    pack_size,
    register,
    tl,
    triton,
)
from fastmask.kernels.roi_align.backward import roi_align_backward
from fastmask.kernels.roi_align.geometry import (
    Settings,
    finite_box,
    level_of,
    neighbours,
    sample_axis,
    scaled_box,
    size_of,
)
from fastmask.kernels.roi_align.levels import ROUNDINGS, level_range
from fastmask.kernels.roi_align.reference import roi_align_reference

# [bins x channels] of a program. Chosen by compiling: 16 sums a thread, all loads 16 bytes, see
# docs/compile_report.md; not yet measured on a GPU.
BINS_PER_PROGRAM = 8
CHANNELS_PER_PROGRAM = {2: 256, 4: 256, 8: 64}  # by the bytes of an element
NUM_WARPS = 4


@jit()
def _sample(feature, y, x, width, channel, mask, C: tl.constexpr):
    """Interpolated values `[bins, channels]` at a sample of each bin; y and x are its `neighbours` along the axes."""
    dtype = y[2].dtype
    value = tl.zeros((y[0].shape[0], channel.shape[0]), dtype)
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            pixel = feature + (y[row].to(tl.int64) * width + x[column])[:, None] * C + channel[None, :]
            loaded = tl.load(pixel) if mask is None else tl.load(pixel, mask=mask[None, :], other=0.0)
            value = tl.fma(loaded.to(dtype), (y[2 + row] * x[2 + column])[:, None], value)
    return value


@jit()
def _only(visited, taps):
    """Neighbours with no weight for bins that have no such sample."""
    return taps[0], taps[1], tl.where(visited, taps[2], 0.0), tl.where(visited, taps[3], 0.0)


@jit(do_not_specialize=["num_images"])
def _roi_align_forward_kernel(
    features,  # L of [N, H_l, W_l, C]
    boxes,  # [K, 5] float32, or float64 with float64 features
    output,  # [K, PH * PW, C] or [K, C, PH * PW]
    argmax,  # like output, int32; not written unless MAXIMUM
    sizes,  # L packed (H_l, W_l)
    scales,  # L float64 bits
    num_images,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    MAXIMUM: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (PH * PW + BINS - 1) // BINS
    k = (tl.program_id(0) // BLOCKS).to(tl.int64)
    bin = tl.program_id(0) % BLOCKS * BINS + tl.arange(0, BINS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = None if C % CHANNELS == 0 else channel < C

    box = boxes + k * 5
    dtype = boxes.dtype.element_ty
    image, level, pooled = level_of(box, num_images, THRESHOLDS, len(features))
    feature, packed, scale = features[0], sizes[0], scales[0]
    for index in tl.static_range(1, len(features)):
        if level == index:
            feature, packed, scale = features[index], sizes[index], scales[index]
    height, width = size_of(packed)
    feature += image * height * width * C

    value = tl.zeros((BINS, CHANNELS), dtype)
    winner = tl.zeros((BINS, CHANNELS), tl.int32)
    x1, y1, x2, y2 = scaled_box(box, float_of(scale, dtype), ALIGNED)
    if pooled & finite_box(x1, y1, x2, y2) & (height > 0) & (width > 0):
        row, column = (bin // PW).to(dtype), (bin % PW).to(dtype)
        base_y, bin_y, grid_y, skip_y, visit_y = sample_axis(y1, y2, row, height, PH, RATIO, ALIGNED)
        base_x, bin_x, grid_x, skip_x, visit_x = sample_axis(x1, x2, column, width, PW, RATIO, ALIGNED)
        if RATIO > 0 and RATIO <= 3:  # unrolled; from there on, compiling takes longer than it is worth
            for i in tl.static_range(RATIO):
                y = neighbours(base_y, bin_y, grid_y, skip_y + i, height)
                for j in tl.static_range(RATIO):
                    x = neighbours(base_x, bin_x, grid_x, skip_x + j, width)
                    sampled = _sample(feature, y, x, width, channel, mask, C)
                    if MAXIMUM:
                        better = (sampled > value) | (i + j == 0)
                        value = tl.where(better, sampled, value)
                        winner = tl.where(better, i * RATIO + j, winner)
                    else:
                        value += sampled
        else:
            for i in range(tl.max(visit_y, 0).to(tl.int32)):
                y = _only(i < visit_y, neighbours(base_y, bin_y, grid_y, skip_y + i, height))
                for j in range(tl.max(visit_x, 0).to(tl.int32)):
                    x = _only(j < visit_x, neighbours(base_x, bin_x, grid_x, skip_x + j, width))
                    sampled = _sample(feature, y, x, width, channel, mask, C)
                    if MAXIMUM:
                        visited = ((i < visit_y) & (j < visit_x))[:, None]
                        better = visited & ((sampled > value) | (i + j == 0))
                        value = tl.where(better, sampled, value)
                        winner = tl.where(better, (i * visit_x.to(tl.int32) + j)[:, None], winner)
                    else:
                        value += sampled
        if not MAXIMUM:
            value = divide(value, tl.maximum(grid_y * grid_x, 1.0)[:, None])

    start = k * (PH * PW * C)
    if CHANNELS_LAST:
        index = start + (bin * C)[:, None] + channel[None, :]
    else:
        index = start + bin[:, None] + (channel * (PH * PW))[None, :]
    stored = (bin < PH * PW)[:, None] if mask is None else (bin < PH * PW)[:, None] & mask[None, :]
    tl.store(output + index, value.to(output.dtype.element_ty), mask=stored)
    if MAXIMUM:
        tl.store(argmax + index, winner, mask=stored)


def _launch_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    maximum: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    output, argmax = empty_pooled(features, boxes, pooled_height, pooled_width, maximum)
    if not output.numel():
        return output, argmax
    settings = Settings(*arguments)
    channels = features[0].shape[1]
    block = min(CHANNELS_PER_PROGRAM[output.element_size()], triton.next_power_of_2(channels))
    bin_blocks = triton.cdiv(pooled_height * pooled_width, BINS_PER_PROGRAM)
    with on_device_of(boxes):
        _roi_align_forward_kernel[(len(boxes) * bin_blocks, triton.cdiv(channels, block))](
            tuple(feature.contiguous(memory_format=torch.channels_last) for feature in features),
            boxes.contiguous(),
            output,
            argmax,
            tuple(pack_size(*feature.shape[2:]) for feature in features),
            tuple(float64_bits(scale) for scale in settings.spatial_scales),
            features[0].shape[0],
            C=channels,
            PH=pooled_height,
            PW=pooled_width,
            RATIO=max(settings.sampling_ratio, 0),
            ALIGNED=settings.aligned,
            MAXIMUM=maximum,
            THRESHOLDS=settings.thresholds(boxes.dtype),
            CHANNELS_LAST=not output.is_contiguous(),
            BINS=BINS_PER_PROGRAM,
            CHANNELS=block,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return output, argmax


def _fake_roi_align(
    features: Sequence[Tensor], boxes: Tensor, pooled_height: int, pooled_width: int, maximum: bool, *_: object
) -> tuple[Tensor, Tensor]:
    return empty_pooled(features, boxes, pooled_height, pooled_width, maximum)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, boxes, _, _, ctx.maximum, *ctx.rule = inputs
    _, argmax = output
    ctx.save_for_backward(boxes, argmax)
    ctx.sizes = [features[0].shape[0], *(side for feature in features for side in feature.shape[2:])]
    ctx.channels_last = is_channels_last(features[0])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    boxes, argmax = ctx.saved_tensors
    grads = roi_align_backward(grad, boxes, argmax, ctx.sizes, ctx.channels_last, ctx.maximum, *ctx.rule)
    return grads, *[None] * 10


_roi_align = register(
    "roi_align(Tensor[] features, Tensor boxes, SymInt pooled_height, SymInt pooled_width, bool maximum,"
    " float[] spatial_scales, int sampling_ratio, bool aligned, float canonical_box_size, int canonical_level,"
    " str level_rounding) -> (Tensor, Tensor)",
    reference=roi_align_reference,
    launch=_launch_roi_align,
    fake=_fake_roi_align,
    backward=_backward,
    setup_context=_setup_context,
)


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    *,
    reduction: str = "mean",
    canonical_box_size: float = 224,
    canonical_level: int = 4,
    level_rounding: str = "torchvision",
) -> Tensor:
    """RoIAlign of each box from its own level of a feature pyramid, in one launch and without a host wait.

    Args:
        features: L >= 1 maps `[N, C, H_l, W_l]`, floating, finest first. Mixed dtypes are promoted to the widest.
            channels_last is the fast path.
        boxes: `[K, 5]`, `(image, x1, y1, x2, y2)`, or one `[K_n, 4]` per image; in image pixels, continuous
            coordinates. Kept in float32 whatever the features are (float64 with float64 features). Boxes that
            are not finite have zero features. No gradient flows to boxes.
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scales: L feature pixels per image pixel, `2 ** -level` for consecutive levels.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        aligned: shift boxes by half a feature pixel (detectron2's `ROIAlignV2`), and no minimum size of 1.
        reduction: `"mean"` or `"max"` of the samples of a bin (He et al. 2017, Table 2c).
        canonical_box_size, canonical_level: a box of this side, in pixels, is pooled from this level
            (Lin et al. 2017, eq. 1).
        level_rounding: `"torchvision"` or `"detectron2"`: whose boundary between levels is reproduced exactly.

    Returns:
        `[K, C, PH, PW]` in the features' dtype and the first one's memory format, differentiable with respect to
        the features, twice for the mean. Forward and backward are deterministic.

    Raises:
        TypeError: features or boxes are not floating.
        ValueError: a wrong shape, size, scale, device or name; on the CPU also an image index outside [0, N).
            On an accelerator that check would have to wait for the device: such boxes have zero features.
    """
    features = checked_features(features, "features")
    rois = roi_format(boxes, features[0])
    pooled_height, pooled_width = checked_output_size(output_size)
    scales = checked_scales(spatial_scales, len(features), "spatial_scales")
    if reduction not in ("mean", "max"):
        raise ValueError(f'reduction: expected "mean" or "max", got {reduction!r}')
    if not 0 < canonical_box_size < float("inf"):
        raise ValueError(f"canonical_box_size: expected a positive number, got {canonical_box_size}")
    if level_rounding not in ROUNDINGS:
        raise ValueError(f"level_rounding: expected one of {ROUNDINGS}, got {level_rounding!r}")
    first, last = level_range(scales)
    if len(scales) > 1 and last < first:
        raise ValueError(f"spatial_scales: expected the finest level first, got {scales}")
    if level_rounding == "detectron2" and last - first + 1 != len(scales):
        raise ValueError(f"spatial_scales: expected consecutive powers of 2, got {scales}")
    output, _ = _roi_align(
        features,
        rois,
        pooled_height,
        pooled_width,
        reduction == "max",
        scales,
        sampling_ratio,
        aligned,
        float(canonical_box_size),
        canonical_level,
        level_rounding,
    )
    return output


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    reduction: str = "mean",
) -> Tensor:
    """RoIAlign on one feature map: `torchvision.ops.roi_align`, and the maximum besides.

    Args:
        input: `[N, C, H, W]` features, floating.
        boxes: `[K, 5]`, `(image, x1, y1, x2, y2)`, or one `[K_n, 4]` per image, in image pixels.
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        aligned: shift boxes by half a feature pixel, and no minimum size of 1.
        reduction: `"mean"` or `"max"` of the samples of a bin.

    Returns:
        `[K, C, PH, PW]`; see `multiscale_roi_align`, of which this is the case of one level, also for errors.
    """
    return multiscale_roi_align(
        [input], boxes, output_size, [spatial_scale], sampling_ratio, aligned, reduction=reduction
    )
