"""Which level of a feature pyramid a box is pooled from (Lin et al. 2017, Feature Pyramid Networks, eq. 1).

    level = floor(canonical_level + log2(sqrt(area) / canonical_box_size))

detectron2 and torchvision guard the logarithm differently, and so disagree on boxes whose area lies within a few
float32 steps of a boundary. `level_rounding` selects whose boundary holds:

    "torchvision"   1e-6 is added outside the logarithm
    "detectron2"    1e-8 is added inside it

Kernels compare areas with thresholds instead: the smallest area that reaches each level. Bisection through the same
chain of float operations finds them, so that kernels and references agree on both sides of each boundary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastmask.kernels._rois import check_scales
from fastmask.kernels._runtime import float64_bits, pack_size
from fastmask.kernels._validation import check_choice, check_int, check_positive

ROUNDINGS = ("torchvision", "detectron2")
# Not for users: column 0 of boxes `[K, 5]` is image * L + level, and the boxes are in pixels of their level.
EXPLICIT = "explicit"


class LevelRule(NamedTuple):
    """The settings of eq. 1: boxes of `canonical_box_size` pixels squared are pooled from `canonical_level`."""

    canonical_box_size: float
    canonical_level: int
    level_rounding: str

    def levels_of(self, areas: Tensor) -> Tensor:
        """Unclamped levels, floating; NaN for a negative or NaN area."""
        ratio = areas.sqrt() / self.canonical_box_size
        if self.level_rounding == "detectron2":
            return (self.canonical_level + (ratio + 1e-8).log2()).floor()
        epsilon = torch.tensor(1e-6, dtype=areas.dtype, device=areas.device)
        return (self.canonical_level + ratio.log2() + epsilon).floor()


class PyramidSpec(Protocol):
    """The settings of an operator that map boxes to levels, each box to one."""

    @property
    def spatial_scales(self) -> Sequence[float]: ...

    @property
    def canonical_box_size(self) -> float: ...

    @property
    def canonical_level(self) -> int: ...

    @property
    def level_rounding(self) -> str: ...


def rule_of(spec: PyramidSpec) -> LevelRule:
    """The settings that choose a box's level."""
    return LevelRule(spec.canonical_box_size, spec.canonical_level, spec.level_rounding)


def thresholds_of(spec: PyramidSpec, dtype: torch.dtype) -> tuple[int, ...] | None:
    """The smallest area of each level after the first, in `dtype`, as float64 bits; None if boxes name their level."""
    if spec.level_rounding == EXPLICIT:
        return None
    return area_thresholds(*level_range(spec.spatial_scales), rule_of(spec), dtype)


def scale_bits_of(spec: PyramidSpec) -> tuple[int, ...]:
    """`spatial_scales` as float64 bits."""
    return tuple(float64_bits(scale) for scale in spec.spatial_scales)


def pack_sizes(levels: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Each level's `(height, width)` in one integer, as kernels take them."""
    return tuple(pack_size(height, width) for height, width in levels)


def pyramid_numbers(
    spec: PyramidSpec, num_images: int, levels: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """A pyramid as kernels take it, `sizes, num_images, scales`; `levels` are its `(height, width)`."""
    return pack_sizes(levels), num_images, scale_bits_of(spec)


def level_range(spatial_scales: Sequence[float]) -> tuple[int, int]:
    """The first and last level of the pyramid: a level's scale is `2 ** -level`."""
    return int(-math.log2(spatial_scales[0])), int(-math.log2(spatial_scales[-1]))


def check_levels(name: str, spatial_scales: Sequence[float], level_rounding: str) -> None:
    """The finest level comes first; detectron2 also requires consecutive levels."""
    first, last = level_range(spatial_scales)
    if len(spatial_scales) > 1 and last < first:
        raise ValueError(f"{name}: expected the finest level first, got {spatial_scales}")
    if level_rounding == "detectron2" and last - first + 1 != len(spatial_scales):
        raise ValueError(f"{name}: expected consecutive powers of 2, got {spatial_scales}")


def check_pyramid(
    count: int, spatial_scales: Any, canonical_box_size: Any, canonical_level: Any, level_rounding: Any
) -> dict[str, Any]:
    """The arguments that map boxes to `count` levels, checked: fields of a `PyramidSpec` by name."""
    scales = check_scales("spatial_scales", spatial_scales, count)
    rounding = check_choice("level_rounding", level_rounding, ROUNDINGS)
    check_levels("spatial_scales", scales, rounding)
    return {
        "spatial_scales": scales,
        "canonical_box_size": check_positive("canonical_box_size", canonical_box_size),
        "canonical_level": check_int("canonical_level", canonical_level),
        "level_rounding": rounding,
    }


def assign_fpn_levels(boxes: Tensor, spatial_scales: Sequence[float], rule: LevelRule) -> Tensor:
    """Index `[K]` into the pyramid of each box `[K, 4]`, int64; -1 for a box that has no level.

    One level takes every box. With more, a box of negative or NaN area has no level, and neither has one
    whose level is missing from a pyramid with gaps: both peers leave the features of such boxes at zero.
    """
    if len(spatial_scales) == 1:
        return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    first, last = level_range(spatial_scales)
    levels = rule.levels_of((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    index = levels.clamp(first, last) - first
    return index.where(index < len(spatial_scales), -1).long()  # NaN compares false


@lru_cache(maxsize=64)
def area_thresholds(first: int, last: int, rule: LevelRule, dtype: torch.dtype) -> tuple[int, ...]:
    """The smallest areas, in `dtype`, that `rule` assigns to levels first + 1 .. last, as float64 bits."""
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    levels = torch.arange(first + 1, last + 1, device="cpu")
    exact = (rule.canonical_box_size * 2.0 ** (levels.double() - rule.canonical_level)).square().to(dtype)
    below, reached = (exact / 2).view(bits), (exact * 2).view(bits)  # positive floats sort like their bits
    while (reached - below).max() > 1 if len(levels) else False:
        middle = below + (reached - below) // 2
        hit = rule.levels_of(middle.view(dtype)) >= levels
        below, reached = middle.where(~hit, below), middle.where(hit, reached)
    return tuple(float64_bits(area) for area in reached.view(dtype).tolist())
