"""Mask targets: the part of an object's mask that lies in each RoI, at the resolution of the mask head (§3.1).

    polygons:        target[k, i, j] = 1 if pycocotools has pixel (i, j) of the object's polygons, whose vertices are
                     ((x - x1) * W / max(x2 - x1, 0.1), (y - y1) * H / max(y2 - y1, 0.1)), in an image of H x W
    bitmaps, RLE:    target[k] = roi_align(bitmap, box, (H, W))

He et al. 2017, "the mask target is the intersection between an RoI and its associated ground-truth mask". K RoIs
`[x1, y1, x2, y2]` in pixels of the image, B images of G objects in all, H x W the resolution. Coordinates are
continuous: pixel j covers [j, j + 1).

Polygons are what detectron2 computes on the host, one RoI at a time, and to the bit: `polygons.py` has pycocotools'
arithmetic in closed form. Bitmaps are what torchvision's `project_masks_on_boxes` computes, RLE the same for the mask
that it encodes. Masks stay in the form of the annotations; peers decode them to bitmaps and convert these to float32,
427 MB for 100 masks of 800 x 1333.

Deterministic: one writer for each element, and sums in a fixed order. Targets have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmask.kernels._rois import check_sampling_ratio
from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import MAX_INT32, check_flag, check_int, check_pair, check_tensor, describe
from fastmask.kernels.mask_targets.op import MaskTargetsSpec, mask_targets_operator
from fastmask.masks import Masks

MAX_SIDE = 2**18  # of a target


@overridable
def mask_targets(
    masks: Masks,
    boxes: Tensor,
    matches: Tensor,
    size: int | tuple[int, int],
    *,
    aligned: bool = False,
    sampling_ratio: int = 0,
) -> Tensor:
    """The mask of the object of each RoI, cut to the RoI at a fixed resolution, without synchronisation.

    Args:
        masks: of the objects of one image or of a batch, from `Masks.from_coco`, `from_bitmaps` and `batch`.
        boxes: `[B, S, 4]`, S RoIs `(x1, y1, x2, y2)` of each image of `masks`, or `[K, 4]`, RoIs of any images;
            floating. A side below 0.1 pixels counts as 0.1 for polygons.
        matches: `[B, S]`, the object of each RoI among those of its image; or `[K]`, among all objects of `masks`.
            Integers. A number that is none of an object, such as -1, gives zeros.
        size: the resolution, `(H, W)` or one number for both.
        aligned: for bitmaps and RLE, whether boxes are shifted by half a pixel, as in `roi_align`.
            torchvision's targets are not, detectron2's are.
        sampling_ratio: for bitmaps and RLE, samples per pixel of the target and axis; 0 or less: as many as there are
            pixels of the object's own mask, rounded up.

    Returns:
        `[B, S, H, W]` or `[K, H, W]` float32: 0 or 1 for polygons, 0..1 for bitmaps and RLE. RoIs with a coordinate
        that is not finite have zeros. Without a gradient.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: `boxes` or `matches` has another shape, the devices differ, or `size` or `sampling_ratio` is out
            of range.

    Source: He et al. 2017, Mask R-CNN, §3.1.
    """
    if not isinstance(masks, Masks):
        raise TypeError(f"masks: expected Masks, got {describe(masks)}")
    check_tensor("boxes", boxes, floating=True)
    check_tensor("matches", matches, integer=True)
    images = len(masks.sizes)
    batched = boxes.ndim == 3
    if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4 or (batched and boxes.shape[0] != images):
        raise ValueError(f"boxes: expected [{images}, S, 4] or [K, 4], got {list(boxes.shape)}")
    if matches.shape != boxes.shape[:-1]:
        raise ValueError(f"matches: expected {list(boxes.shape[:-1])} to match boxes, got {list(matches.shape)}")
    for name, tensor in (("boxes", boxes), ("matches", matches)):
        if tensor.device != masks.device:
            raise ValueError(f"{name}: expected on {masks.device} like masks, got {tensor.device}")
    height, width = _check_size(size)
    ratio = check_sampling_ratio(sampling_ratio, (height, width))
    return mask_targets_operator(
        masks.vertices,
        masks.parts,
        masks.runs,
        masks.pixels,
        masks.objects,
        masks.transforms,
        masks.offsets if batched else None,
        boxes.detach(),
        matches.long(),
        *MaskTargetsSpec(height, width, check_flag("aligned", aligned), max(ratio, 0)),
    )


def _check_size(size: Any) -> tuple[int, int]:
    """H and W: kernels number the pixels of a target with 32 bits, and their blocks along an axis with 16."""
    if isinstance(size, Sequence):
        height, width = check_pair("size", size, least=1, most=MAX_SIDE)
    else:
        height = width = check_int("size", size, least=1, most=MAX_SIDE)
    if height * width > MAX_INT32:
        raise ValueError(f"size: expected fewer than 2^31 pixels, got {height} x {width}")
    return height, width
