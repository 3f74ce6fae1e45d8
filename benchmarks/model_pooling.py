"""What the static models of pooling operators share: the boxes of `harness/workloads.py`, on their levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.operators import Launch
from benchmarks.harness.pooling import Direction, Inputs
from benchmarks.harness.workloads import STRIDES, objects
from fastmask.kernels.roi_align.geometry import select_boxes
from fastmask.kernels.roi_align.levels import EXPLICIT
from fastmask.kernels.roi_align.op import RoIAlignSpec
from fastmask.kernels.roi_warp import RoundingSpec, _round_boxes

SCALES = [1 / stride for stride in STRIDES]
BOX_BYTES = 20
CACHES = 132  # L1 caches, one of each multiprocessor

Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Group:
    """The boxes that are pooled from one level of one image, in its pixels: `[K, 2]`, y and x."""

    height: int
    width: int
    start: Tensor
    end: Tensor


@lru_cache
def boxes_of(images: int, count: int) -> tuple[Tensor, ...]:
    """`[K, 4]` boxes of each image."""
    return tuple(objects(count // images, seed=image) for image in range(images))


def to_rois(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes `[K, 5]`."""
    return torch.cat([torch.nn.functional.pad(box, (1, 0), value=image) for image, box in enumerate(boxes)])


def sizes_of(launch: Launch) -> Sizes:
    """Height and width of each level."""
    mask = (1 << 30) - 1
    return tuple((packed >> 31 & mask, packed >> 1 & mask) for packed in launch.arguments["sizes"])


def spec_of(arguments: Mapping[str, Any]) -> RoIAlignSpec:
    """How RoIAlign's kernels pool. RoIWarp's boxes name their level, and are in its pixels: all scales are 1."""
    levels = len(arguments["sizes"])
    on_level = levels > 1 and len(set(arguments["scales"])) == 1
    return RoIAlignSpec(
        pooled_height=arguments["PH"],
        pooled_width=arguments["PW"],
        spatial_scales=[1.0] * levels if on_level else SCALES[:levels],
        sampling_ratio=arguments["RATIO"],
        aligned=arguments["ALIGNED"],
        reduction="mean",
        level_rounding=EXPLICIT if on_level else "torchvision",
    )


def rois_of(images: int, count: int, spec: RoIAlignSpec) -> Tensor:
    """Boxes `[K, 5]` as RoIAlign's kernels take them."""
    rois = to_rois(boxes_of(images, count))
    return _round_boxes(rois, RoundingSpec(images, SCALES)) if spec.level_rounding == EXPLICIT else rois


def groups(launch: Launch) -> Iterator[Group]:
    """The boxes of RoIAlign's kernels, level by level and image by image."""
    a = launch.arguments
    spec, sizes, images = spec_of(a), sizes_of(launch), a["num_images"]
    rois = rois_of(images, len(a["boxes"]), spec)
    per_image = len(sizes) if spec.level_rounding == EXPLICIT else 1
    shift = 0.5 if spec.aligned else 0.0
    levels = zip(select_boxes(rois, images, spec), sizes, spec.spatial_scales, strict=True)
    for rows, (height, width), scale in levels:
        on_level = rois[rows]
        for image in range(images):
            corners = on_level[on_level[:, 0] // per_image == image, 1:] * scale - shift
            yield Group(height, width, corners[:, :2].flip(1), corners[:, 2:].flip(1))


def bytes_that_move(launch: Launch, direction: Direction, features: Sequence[Tensor], outputs: float) -> float:
    """See `Inputs.bytes`."""
    a = launch.arguments
    boxes = boxes_of(a["num_images"], len(a["boxes"] if "boxes" in a else a["windows"]))
    strides = STRIDES if len(features) > 1 else STRIDES[2:3]
    return Inputs(features, boxes, strides).bytes(direction, int(outputs))
