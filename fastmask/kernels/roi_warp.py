"""RoIWarp: RoIAlign of a box that is rounded to whole pixels as in RoIPool (He et al. 2017, §3, Table 2c).

    x1, y1, x2, y2 = round(box * spatial_scale)            halves away from zero, as C's round does
    width, height  = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    output         = roi_align(input, [image, x1, y1, x1 + width, y1 + height], aligned=False)

K boxes `[image, x1, y1, x2, y2]` in image pixels, L levels `[N, C, H_l, W_l]`, PH x PW bins. The level of a box is
RoIAlign's, chosen before the box is rounded; a single feature map is the case L = 1. Boxes of a level that round to the
same pixels pool the same features. The paper compares RoIAlign with this operator to show that rounding, not the lack
of interpolation, costs RoIPool its accuracy. Rounding is in float32 (float64 for float64 features).

No kernel of its own: boxes are rounded by about thirty PyTorch operations on `[K, 5]` numbers, and RoIAlign's kernel
pools all levels in one launch. It takes boxes in pixels of a level that is given: the area of a rounded box may belong
to another level. Deterministic, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._rois import (
    REDUCTIONS,
    check_features,
    check_output_size,
    check_sampling_ratio,
    image_indices,
    to_rois,
)
from fastmask.kernels._runtime import Size, overridable, register
from fastmask.kernels._validation import check_choice, check_positive, check_sequence
from fastmask.kernels.roi_align.levels import EXPLICIT, check_pyramid
from fastmask.kernels.roi_align.op import RoIAlignSpec, roi_align_operator
from fastmask.kernels.roi_pool.geometry import levels_of_boxes, quantise


class RoundingSpec(NamedTuple):
    """The settings that round a box to pixels of its level, as `multiscale_roi_warp` documents them."""

    num_images: Size
    spatial_scales: Sequence[float]  # a tuple, except in a public function
    canonical_box_size: float = 224.0
    canonical_level: int = 4
    level_rounding: str = "torchvision"


def _round_boxes(boxes: Tensor, spec: RoundingSpec) -> Tensor:
    """Boxes `[K, 5]` in pixels of their level, from the first pixel to the end of the last one.

    Column 0 is image * L + level. A box that is not pooled has a corner that is NaN.
    """
    level, scale = levels_of_boxes(boxes, spec), boxes.new_zeros(len(boxes), 1)
    for index, factor in enumerate(spec.spatial_scales):
        scale.masked_fill_((level == index)[:, None], factor)
    x1, y1, width, height = (edge.to(boxes.dtype) for edge in quantise(boxes, scale))
    place = boxes[:, 0].floor() * len(spec.spatial_scales) + level.clamp(min=0)
    # A box that is not finite has size 0 here; NaN keeps it from becoming finite.
    x2 = (x1 + width).where((width > 0) & (level >= 0), torch.nan)
    return torch.stack([place, x1, y1, x2, y1 + height], 1)


def _round_boxes_on_cpu(boxes: Tensor, spec: RoundingSpec) -> Tensor:
    image_indices(boxes, spec.num_images)  # raises if one is not in the batch
    return _round_boxes(boxes, spec)


def _fake_round_boxes(boxes: Tensor, spec: RoundingSpec) -> Tensor:
    del spec
    return torch.empty_like(boxes, memory_format=torch.contiguous_format)


# An operator, because tracing does not see through the search for the areas at which levels begin.
_round_boxes_operator = register(
    "round_boxes(Tensor boxes, *spec) -> Tensor",
    reference=_round_boxes_on_cpu,
    launch=_round_boxes,
    fake=_fake_round_boxes,
    spec=RoundingSpec,
)


@overridable
def multiscale_roi_warp(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = 2,
    *,
    reduction: str = "mean",
    canonical_box_size: float = 224,
    canonical_level: int = 4,
    level_rounding: str = "torchvision",
) -> Tensor:
    """RoIWarp of each box from its own level of a feature pyramid, without synchronisation.

    Args:
        features: list or tuple of L >= 1 levels `[N, C, H_l, W_l]`, finest first: float16, bfloat16, float32 or
            float64. Mixed dtypes are promoted as by `torch.promote_types`. channels_last is fastest.
        boxes: `[K, 5]` rows `(image, x1, y1, x2, y2)`, or a list of one `[K_n, 4]` per image, in image pixels. They are
            rounded to pixels of their level, both ends included. Boxes of any floating dtype are converted to float32
            (float64 with float64 features). A box with a coordinate that is not finite pools zeros. Boxes receive no
            gradient.
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scales: L numbers, level pixels per image pixel: `2 ** -level` for each level. A box whose level is
            missing between the first and the last pools zeros; `level_rounding="detectron2"` allows no gaps.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        reduction: `"mean"` or `"max"` of the samples of a bin.
        canonical_box_size, canonical_level: a box of this side, in image pixels before it is rounded, is pooled from
            this level (Lin et al. 2017, Feature Pyramid Networks, eq. 1).
        level_rounding: `"torchvision"` or `"detectron2"`: whose boundary between levels is reproduced exactly.

    Returns:
        `[K, C, PH, PW]` in the features' dtype and the first level's memory format. Differentiable with respect to
        the features, twice for the mean. Forward and backward are deterministic.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, length, device or value. An image index outside [0, N) raises on
            the CPU only: on an accelerator this check would need a host-device synchronisation, and such a box pools
            zeros.
        NotImplementedError: in a backward, for a second derivative of the maximum.
    """
    levels = check_features("features", check_sequence("features", features, "Tensors"))
    rois = to_rois(boxes, levels[0], "features")
    pooled = check_output_size(output_size, levels[0].shape[1])
    pyramid = check_pyramid(len(levels), spatial_scales, canonical_box_size, canonical_level, level_rounding)
    spec = RoundingSpec(
        num_images=levels[0].shape[0],
        **pyramid,
    )
    return _pool_rounded(levels, rois, pooled, spec, sampling_ratio, reduction)


@overridable
def roi_warp(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    *,
    reduction: str = "mean",
) -> Tensor:
    """RoIWarp: boxes rounded to whole pixels as in RoIPool, then sampled bilinearly (He et al. 2017, §3, Table 2c).

    Args:
        input: `[N, C, H, W]` features: float16, bfloat16, float32 or float64. channels_last is fastest.
        boxes: `[K, 5]` rows `(image, x1, y1, x2, y2)`, or a list of one `[L, 4]` per image, in image pixels. They are
            rounded to pixels of `input`, both ends included. Boxes of any floating dtype are converted to float32
            (float64 with a float64 input). A box with a coordinate that is not finite pools zeros. Boxes receive no
            gradient.
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scale: pixels of `input` per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        reduction: `"mean"` or `"max"` of the samples of a bin.

    Returns:
        `[K, C, PH, PW]` in the input's dtype and memory format. Differentiable with respect to `input`, twice for the
        mean. Forward and backward are deterministic.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value. An image index outside [0, N) raises on the CPU
            only: on an accelerator this check would need a host-device synchronisation, and such a box pools zeros.
        NotImplementedError: in a backward, for a second derivative of the maximum.
    """
    levels = check_features("input", [input])
    rois = to_rois(boxes, levels[0], "input")
    pooled = check_output_size(output_size, levels[0].shape[1])
    spec = RoundingSpec(levels[0].shape[0], [check_positive("spatial_scale", spatial_scale)])
    return _pool_rounded(levels, rois, pooled, spec, sampling_ratio, reduction)


def _pool_rounded(
    levels: list[Tensor],
    rois: Tensor,
    pooled: tuple[int, int],
    rounding: RoundingSpec,
    sampling_ratio: int,
    reduction: str,
) -> Tensor:
    """RoIAlign of rounded boxes."""
    spec = RoIAlignSpec(
        pooled_height=pooled[0],
        pooled_width=pooled[1],
        spatial_scales=[1.0] * len(levels),
        sampling_ratio=check_sampling_ratio(sampling_ratio, pooled),
        aligned=False,
        reduction=check_choice("reduction", reduction, REDUCTIONS),
        level_rounding=EXPLICIT,
    )
    rounded = _round_boxes_operator(rois.detach(), *rounding)
    output, _ = roi_align_operator(levels, rounded, *spec)
    return output
