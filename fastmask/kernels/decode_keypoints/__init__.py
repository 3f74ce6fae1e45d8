"""Keypoints from heatmaps: the largest value of each heatmap after bicubic resizing to its box (He et al. 2017, §5).

    v[y, x] = sum over i, j in 0..3 of  w_i(s_y) * w_j(s_x) * heatmap[floor(s_y) - 1 + i, floor(s_x) - 1 + j]
    s_y = (y + 1/2) * m / h - 1/2        h = ceil(max(y2 - y1, 1))        x, w likewise
    (y, x) = argmax of v, the first of equal ones
    keypoint = (x1 + (x + 1/2) * max(x2 - x1, 1) / w,  y1 + (y + 1/2) * max(y2 - y1, 1) / h)

N RoIs, P keypoints, m x m heatmaps of logits, boxes `[x1, y1, x2, y2]` in image pixels, continuous coordinates. The
weights are those of cubic convolution with a = -3/4, indices are clamped: `F.interpolate(mode="bicubic")`, which
torchvision and detectron2 call for each RoI, with two host-device synchronisations each.

Resized heatmaps are never written: 500 MB for 100 persons at 800 x 1333. Most of their pixels are not even computed. A
*cell* is the square between four neighbouring heatmap pixels; its resized pixels have the same 4 x 4 neighbours. The
two outer weights along an axis are negative or 0, of sum -n, 0 <= n <= 3/16, so a row of neighbours a, b, c, d gives

    upper = U + 3/16 * max(U - min(a, d), 0)    U = max(b, c)
    lower = L - 3/16 * max(max(a, d) - L, 0)    L = min(b, c)

as bounds of its interpolation, and the rows' bounds give one for the cell in the same way: from the larger `upper` of
its inner rows and the smaller `lower` of its outer rows. Only cells whose bound reaches the value at the resized pixel
next to the largest heatmap pixel are evaluated, by the formula above. Deterministic.
"""

from __future__ import annotations

from torch import Tensor

from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import MAX_INT32, check_choice, check_same_device, check_tensor
from fastmask.kernels.decode_keypoints.geometry import CONVENTIONS
from fastmask.kernels.decode_keypoints.op import decode_keypoints_operator


@overridable
def decode_keypoints(heatmaps: Tensor, boxes: Tensor, *, convention: str = "torchvision") -> tuple[Tensor, Tensor]:
    """The most likely pixel of each keypoint, after bicubic resizing of its heatmap to the box.

    Args:
        heatmaps: `[N, P, m, m]` logits, floating.
        boxes: `[N, 4]`, floating, `(x1, y1, x2, y2)` in image pixels. Sides below 1 count as 1.
        convention: what is returned, `"torchvision"` or `"detectron2"`; both find the same pixels.

    Returns:
        Keypoints `[N, P, 3]` and scores `[N, P]`, float32 (float64 for float64 heatmaps), without a gradient.
        x and y of a keypoint are the centre of the largest of the resized heatmap's pixels, the first of equal ones.
        `"torchvision"`: keypoints (x, y, 1), and their logits after resizing as scores. `"detectron2"`: keypoints
        (x, y, logit), and as scores the probabilities under a softmax over the m * m pixels before resizing,
        `1 / sum(exp(heatmap - logit))`.
        A heatmap that is not finite has the centre of the first pixel and a NaN score. A box of more than 8192 pixels
        along an axis is divided into 8192 pixels there, and one whose side is NaN has one pixel; coordinates of a box
        that is not finite may not be finite.

    Raises:
        TypeError: `heatmaps` or `boxes` is not a dense floating tensor, or `convention` is not a string.
        ValueError: `heatmaps` or `boxes` has another shape, they are on two devices, or `convention` is unknown.

    Source: He et al. 2017, Mask R-CNN, §5; torchvision's and detectron2's `heatmaps_to_keypoints`.
    """
    check_tensor("heatmaps", heatmaps, floating=True)
    check_tensor("boxes", boxes, floating=True)
    if heatmaps.ndim != 4 or 0 in heatmaps.shape[1:]:
        raise ValueError(f"heatmaps: expected [N, P, m, m] with P and m at least 1, got {list(heatmaps.shape)}")
    if heatmaps.shape[2] * heatmaps.shape[3] > MAX_INT32 // 4:
        raise ValueError(f"heatmaps: expected fewer than 2^29 pixels in a heatmap, got {list(heatmaps.shape)}")
    if boxes.shape != (heatmaps.shape[0], 4):
        raise ValueError(f"boxes: expected [{heatmaps.shape[0]}, 4] to match heatmaps, got {list(boxes.shape)}")
    check_same_device("boxes", boxes, "heatmaps", heatmaps)
    convention = check_choice("convention", convention, CONVENTIONS)
    # Detached: the operator has no gradient, and its scores must not claim to have one.
    return decode_keypoints_operator(heatmaps.detach(), boxes.detach(), convention)
