"""RoIPool: the largest feature in each bin of a RoI whose box is rounded to whole pixels (Girshick 2015, §2.1).

    x1, y1, x2, y2 = round(box * spatial_scale)            halves away from zero, as C's round does
    width          = max(x2 - x1 + 1, 1)                   both ends are pixels of the RoI
    columns(q)     = x1 + floor(q * width / PW) up to x1 + ceil((q + 1) * width / PW) - 1      rows(p) likewise
    output[k, c, p, q] = max of features[level(k)][image(k), c, y, x] over rows(p), columns(q), clipped to the level

and 0 for a bin that clipping leaves empty. He et al. 2017, §3 and table 6, compare RoIAlign with it.

K boxes `[image, x1, y1, x2, y2]` in image pixels, L levels `[N, C, H_l, W_l]`, PH x PW bins. The level of a box is
RoIAlign's (`roi_align/levels.py`), chosen before the box is rounded; a single feature map is the case L = 1. Rounding
boxes to pixels of the feature map is the misalignment that RoIAlign removes. Box arithmetic is in float32 (float64 for
float64 features), operation for operation torchvision's, so the same pixels win: of equal features the first in
row-major order, and never a NaN. `argmax` holds the winner's y * W + x in its level, or -1.

The kernel reads features as channels-last rows, 16 bytes a load, in their own precision; in NCHW each output would
gather scattered values of 2 to 4 bytes, and one transposing copy costs less.

Deterministic, forward and backward. `backward.py` has the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmask.kernels._rois import check_features, check_output_size, to_rois
from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import MAX_INT32, check_positive, check_sequence
from fastmask.kernels.roi_align.levels import check_pyramid
from fastmask.kernels.roi_pool.op import RoIPoolSpec, roi_pool_operator


@overridable
def multiscale_roi_pool(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scales: Sequence[float],
    *,
    canonical_box_size: float = 224,
    canonical_level: int = 4,
    level_rounding: str = "torchvision",
) -> Tensor:
    """RoIPool of each box from its own level of a feature pyramid, in one launch and without synchronisation.

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
        canonical_box_size, canonical_level: a box of this side, in image pixels before it is rounded, is pooled from
            this level (Lin et al. 2017, Feature Pyramid Networks, eq. 1).
        level_rounding: `"torchvision"` or `"detectron2"`: whose boundary between levels is reproduced exactly.

    Returns:
        `[K, C, PH, PW]` in the features' dtype and the first level's memory format. A bin outside its level is 0; a bin
        without a feature above the dtype's lowest finite number (float32's for float64), such as one of NaNs only, is
        that number. Neither has a gradient; the gradient of any other bin goes to the first of its largest features.
        Twice differentiable with respect to the features. Forward and backward are deterministic.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, length, device or value. An image index outside [0, N) raises on
            the CPU only: on an accelerator this check would need a host-device synchronisation, and such a box pools
            zeros.
    """
    levels = check_features("features", check_sequence("features", features, "Tensors"))
    _check_pixels("features", levels)
    rois = to_rois(boxes, levels[0], "features")
    pooled = check_output_size(output_size, levels[0].shape[1])
    pyramid = check_pyramid(len(levels), spatial_scales, canonical_box_size, canonical_level, level_rounding)
    spec = RoIPoolSpec(
        *pooled,
        **pyramid,
    )
    output, _ = roi_pool_operator(levels, rois, *spec)
    return output


@overridable
def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """RoIPool: the largest feature in each bin of each RoI (Girshick 2015, §2.1), as `torchvision.ops.roi_pool`.

    Args:
        input: `[N, C, H, W]` features: float16, bfloat16, float32 or float64. channels_last is fastest.
        boxes: `[K, 5]` rows `(image, x1, y1, x2, y2)`, or a list of one `[L, 4]` per image, in image pixels. They are
            rounded to pixels of `input`, both ends included. Boxes of any floating dtype are converted to float32
            (float64 with a float64 input). A box with a coordinate that is not finite pools zeros. Boxes receive no
            gradient.
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scale: pixels of `input` per image pixel.

    Returns:
        `[K, C, PH, PW]` in the input's dtype and memory format. A bin outside the feature map is 0; a bin without a
        feature above the dtype's lowest finite number (float32's for float64), such as one of NaNs only, is that
        number. Neither has a gradient; the gradient of any other bin goes to the first of its largest features.
        Twice differentiable with respect to `input`. Forward and backward are deterministic.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value. An image index outside [0, N) raises on the CPU
            only: on an accelerator this check would need a host-device synchronisation, and such a box pools zeros.
    """
    levels = check_features("input", [input])
    _check_pixels("input", levels)
    rois = to_rois(boxes, levels[0], "input")
    spec = RoIPoolSpec(
        *check_output_size(output_size, levels[0].shape[1]),
        spatial_scales=[check_positive("spatial_scale", spatial_scale)],
    )
    output, _ = roi_pool_operator(levels, rois, *spec)
    return output


def _check_pixels(name: str, levels: Sequence[Tensor]) -> None:
    """argmax numbers the pixels of a level with 32 bits."""
    for feature in levels:
        if feature.shape[2] * feature.shape[3] > MAX_INT32:
            raise ValueError(f"{name}: expected fewer than 2^31 pixels per image, got {list(feature.shape)}")
