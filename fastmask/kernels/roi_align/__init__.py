"""RoIAlign over a feature pyramid: level assignment, sampling and pooling in one launch (He et al. 2017, §3).

    output[k, c, p, q] = mean or max over samples (i, j) of bilinear(features[level(k)][image(k), c], y, x)
    y = start_y + p * bin_y + (i + 1/2) * bin_y / grid_y        x likewise

K boxes `[image, x1, y1, x2, y2]`, L levels `[N, C, H_l, W_l]`, PH x PW bins. Boxes are in image pixels and
`spatial_scales[l]` maps them to level l; `geometry.py` has the positions of samples, `levels.py` the level of a box.
RoIAlign on a single feature map is the case L = 1.

Fused: the kernel assigns levels itself, so there is no host-device synchronisation and no box is moved; features are
read in their own precision, channels innermost, 16 bytes a thread. Casting an 800 x 1344 pyramid to float32 first, as
the peers do under autocast, would alone write 91 MB. Features that are not channels_last are transposed once: a
scattered 2-byte load costs a whole 32-byte sector, and each output needs 16 of them.

Deterministic, forward and backward: sums are float32 (float64 for float64 features) in a fixed order, so the same
inputs give the same bits. `backward.py` has the gradient of the features, `box_gradient.py` that of the boxes. The
latter costs nothing unless boxes require grad: only then are the features kept for the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmask.kernels._rois import (
    REDUCTIONS,
    check_features,
    check_output_size,
    check_sampling_ratio,
    to_rois,
)
from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import check_choice, check_flag, check_positive, check_sequence
from fastmask.kernels.roi_align.levels import check_pyramid
from fastmask.kernels.roi_align.op import RoIAlignSpec, roi_align_operator


@overridable
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
    """RoIAlign of each box from its own level of a feature pyramid, in one launch and without synchronisation.

    Args:
        features: list or tuple of L >= 1 levels `[N, C, H_l, W_l]`, finest first: float16, bfloat16, float32 or
            float64. Mixed dtypes are promoted as by `torch.promote_types`. channels_last is fastest.
        boxes: `[K, 5]` rows `(image, x1, y1, x2, y2)`, or a list of one `[K_n, 4]` per image, in image pixels:
            continuous coordinates, pixel j covers [j, j + 1). Boxes of any floating dtype are converted to float32
            (float64 with float64 features). A box with a coordinate that is not finite pools zeros. Boxes that
            require grad receive a gradient, unlike torchvision's; detach them where they are constants.
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scales: L numbers, level pixels per image pixel: `2 ** -level` for each level. A box whose level is
            missing between the first and the last pools zeros; `level_rounding="detectron2"` allows no gaps.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        aligned: shift boxes by half a level pixel and allow sizes below 1 (detectron2's `ROIAlignV2`).
        reduction: `"mean"` or `"max"` of the samples of a bin (He et al. 2017, Table 2c).
        canonical_box_size, canonical_level: a box of this side, in image pixels, is pooled from this level
            (Lin et al. 2017, Feature Pyramid Networks, eq. 1).
        level_rounding: `"torchvision"` or `"detectron2"`: whose boundary between levels is reproduced exactly.

    Returns:
        `[K, C, PH, PW]` in the features' dtype and the first level's memory format. Differentiable with respect to
        the features and the corners of the boxes. The gradient of the features is differentiable too, for the mean;
        that of the boxes is not. Forward and backward are deterministic.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, length, device or value. An image index outside [0, N) raises on
            the CPU only: on an accelerator this check would need a host-device synchronisation, and such a box pools
            zeros.
        NotImplementedError: in a backward, for a second derivative of the maximum or through the gradient of the boxes.
    """
    levels = check_features("features", check_sequence("features", features, "Tensors"))
    rois = to_rois(boxes, levels[0], "features")
    pooled = check_output_size(output_size, levels[0].shape[1])
    pyramid = check_pyramid(len(levels), spatial_scales, canonical_box_size, canonical_level, level_rounding)
    spec = RoIAlignSpec(
        pooled_height=pooled[0],
        pooled_width=pooled[1],
        sampling_ratio=check_sampling_ratio(sampling_ratio, pooled),
        aligned=check_flag("aligned", aligned),
        reduction=check_choice("reduction", reduction, REDUCTIONS),
        **pyramid,
    )
    output, _ = roi_align_operator(levels, rois, *spec)
    return output


@overridable
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
    """RoIAlign on one feature map (He et al. 2017, §3): `torchvision.ops.roi_align`, and the maximum besides.

    Args:
        input: `[N, C, H, W]` features: float16, bfloat16, float32 or float64. channels_last is fastest.
        boxes: `[K, 5]` rows `(image, x1, y1, x2, y2)`, or a list of one `[L, 4]` per image, in image pixels:
            continuous coordinates, pixel j covers [j, j + 1). Boxes of any floating dtype are converted to float32
            (float64 with a float64 input). A box with a coordinate that is not finite pools zeros. Boxes that require
            grad receive a gradient, unlike torchvision's; detach them where they are constants.
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scale: pixels of `input` per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        aligned: shift boxes by half a pixel of `input` and allow sizes below 1 (detectron2's `ROIAlignV2`).
        reduction: `"mean"` or `"max"` of the samples of a bin (He et al. 2017, Table 2c).

    Returns:
        `[K, C, PH, PW]` in the input's dtype and memory format. Differentiable with respect to `input` and the corners
        of the boxes. The gradient of `input` is differentiable too, for the mean; that of the boxes is not. Forward and
        backward are deterministic.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value. An image index outside [0, N) raises on the CPU
            only: on an accelerator this check would need a host-device synchronisation, and such a box pools zeros.
        NotImplementedError: in a backward, for a second derivative of the maximum or through the gradient of the boxes.
    """
    levels = check_features("input", [input])
    rois = to_rois(boxes, levels[0], "input")
    pooled = check_output_size(output_size, levels[0].shape[1])
    spec = RoIAlignSpec(
        pooled_height=pooled[0],
        pooled_width=pooled[1],
        spatial_scales=[check_positive("spatial_scale", spatial_scale)],
        sampling_ratio=check_sampling_ratio(sampling_ratio, pooled),
        aligned=check_flag("aligned", aligned),
        reduction=check_choice("reduction", reduction, REDUCTIONS),
    )
    output, _ = roi_align_operator(levels, rois, *spec)
    return output
