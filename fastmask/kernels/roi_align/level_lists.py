"""The boxes of each image and level, which backward kernels walk instead of all boxes.

A tile of a feature map is reached by boxes of its image and level alone: with two images, four levels and 1024 boxes it
tests about 128 boxes instead of 1024. A program lists the boxes of one image and level in ascending order, so that the
sums of the kernels that follow have a fixed order; nothing is synchronised and there are no atomics.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import jit, tl
from fastmask.kernels.roi_align.geometry import level_of

# One step for the 1024 boxes of a training batch, 4 boxes per thread. Not yet measured on a GPU.
BOXES_PER_STEP = 1024
NUM_WARPS = 8


@jit(do_not_specialize=["num_boxes", "num_images"])
def _list_boxes_by_level_kernel(
    boxes,  # [K, 5]
    listed,  # [N * L, K] int32
    counts,  # [N * L] int32
    num_boxes,
    num_images,
    LEVELS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0)
    image, level = row // LEVELS, row % LEVELS
    listed += row.to(tl.int64) * num_boxes
    count = 0
    for start in range(0, num_boxes, STEP):
        k = start + tl.arange(0, STEP)
        box = boxes + tl.minimum(k, num_boxes - 1).to(tl.int64) * 5
        box_image, box_level, pooled = level_of(box, num_images, THRESHOLDS, LEVELS)
        hit = (k < num_boxes) & pooled & (box_image == image) & (box_level == level)
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(listed + place, k, mask=hit)
        count += tl.sum(hit.to(tl.int32), 0)
    tl.store(counts + row, count)


@lru_cache(maxsize=1024)
def _prepared(num_images: int, num_levels: int, thresholds: tuple[int, ...] | None, step: int) -> Launch:
    return Launch(
        _list_boxes_by_level_kernel,
        num_images,
        LEVELS=num_levels,
        THRESHOLDS=thresholds,
        STEP=step,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def list_boxes_by_level(
    boxes: Tensor, num_images: int, num_levels: int, thresholds: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """The rows of `boxes`, whose device is current, that are pooled from each image and level, in ascending order.

    Args:
        boxes: `[K, 5]`, `(image, x1, y1, x2, y2)` in image pixels, contiguous.
        num_images: N.
        num_levels: L.
        thresholds: the smallest area of each level after the first, as `RoIAlignSpec.thresholds` gives them.

    Returns:
        `listed [N * L, K]` and `counts [N * L]`, int32: row `n * L + l` of `listed` begins with the `counts[n * L + l]`
        boxes of image n and level l. What follows them is undefined. A box that is not pooled is in no list, but a box
        that only scaling to its level makes infinite is: kernels test the scaled box with `finite_box`.
    """
    rows, num_boxes = num_images * num_levels, boxes.shape[0]
    listed = torch.empty((rows, num_boxes), dtype=torch.int32, device=boxes.device)
    counts = torch.empty(rows, dtype=torch.int32, device=boxes.device)
    if rows:
        launch = _prepared(num_images, num_levels, thresholds, BOXES_PER_STEP)
        launch((rows,), boxes, listed, counts, num_boxes)
    return listed, counts
