"""RoIWarp: RoIAlign of a box that is rounded to whole pixels as in RoIPool (He et al. 2017, §3, Table 2c).

    x1, y1, x2, y2 = round(box * spatial_scale)            halves away from zero, as C's round does
    width, height  = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    output         = roi_align(input, [image, x1, y1, x1 + width, y1 + height], aligned=False)

K boxes `[image, x1, y1, x2, y2]` in image pixels, `[N, C, H, W]` features, PH x PW bins. Boxes that round to the same
pixels pool the same features. The paper compares RoIAlign with this operator to show that rounding, not the lack of
interpolation, costs RoIPool its accuracy. Rounding is in float32 (float64 for float64 features).

No kernel of its own: boxes are rounded in torch and pooled by RoIAlign's kernels. Deterministic, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.kernels._rois import check_features, to_rois
from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import check_positive
from fastmask.kernels.roi_align import roi_align
from fastmask.kernels.roi_pool.geometry import quantise


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
    """
    (input,) = check_features("input", [input])
    rois = to_rois(boxes, input, "input").detach()  # rounding has no gradient
    rounded = _round_boxes(rois, check_positive("spatial_scale", spatial_scale))
    return roi_align(input, rounded, output_size, 1.0, sampling_ratio, reduction=reduction)


def _round_boxes(rois: Tensor, spatial_scale: float) -> Tensor:
    """Boxes `[K, 5]` in pixels of the feature map, from the first pixel to the end of the last one."""
    x1, y1, width, height = (edge.to(rois.dtype) for edge in quantise(rois, spatial_scale))
    # A box that is not finite has size 0 here; NaN keeps it from becoming finite.
    return torch.stack([rois[:, 0], x1, y1, (x1 + width).where(width > 0, torch.nan), y1 + height], 1)
