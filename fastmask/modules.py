"""The pooling operators as `nn.Module`s, with torchvision's constructors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastmask.kernels._rois import REDUCTIONS, check_features, check_output_size, check_sampling_ratio
from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import (
    check_choice,
    check_flag,
    check_int,
    check_pair,
    check_positive,
    check_sequence,
    describe,
)
from fastmask.kernels.roi_align import multiscale_roi_align, roi_align
from fastmask.kernels.roi_align.levels import ROUNDINGS, check_levels
from fastmask.kernels.roi_pool import roi_pool
from fastmask.kernels.roi_warp import roi_warp


class RoIAlign(nn.Module):
    """RoIAlign on one feature map (He et al. 2017, §3): `torchvision.ops.RoIAlign`, and the maximum besides.

    Args:
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        aligned: shift boxes by half a feature pixel and allow sizes below 1 (detectron2's `ROIAlignV2`).
        reduction: `"mean"` or `"max"` of the samples of a bin.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        pooled = check_output_size(output_size)
        self.output_size = output_size
        self.spatial_scale = check_positive("spatial_scale", spatial_scale)
        self.sampling_ratio = check_sampling_ratio(sampling_ratio, pooled)
        self.aligned = check_flag("aligned", aligned)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool each RoI; errors are those of `roi_align`, where `rois` are named `boxes`.

        Args:
            input: `[N, C, H, W]` features, floating.
            rois: `[K, 5]` rows `(image, x1, y1, x2, y2)`, or a list of one `[L, 4]` per image, in image pixels. They
                receive a gradient if they require one.

        Returns:
            `[K, C, PH, PW]` in the input's dtype and memory format.
        """
        return roi_align(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale},"
            f" sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, reduction={self.reduction!r}"
        )


class RoIPool(nn.Module):
    """The largest feature in each bin of a RoI rounded to whole pixels (Girshick 2015): `torchvision.ops.RoIPool`.

    Args:
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scale: feature pixels per image pixel.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float) -> None:
        super().__init__()
        check_output_size(output_size)
        self.output_size = output_size
        self.spatial_scale = check_positive("spatial_scale", spatial_scale)

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool each RoI; errors are those of `roi_pool`, where `rois` are named `boxes`.

        Args:
            input: `[N, C, H, W]` features, floating.
            rois: `[K, 5]` rows `(image, x1, y1, x2, y2)`, or a list of one `[L, 4]` per image, in image pixels. They
                receive no gradient.

        Returns:
            `[K, C, PH, PW]` in the input's dtype and memory format.
        """
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


class RoIWarp(nn.Module):
    """RoIAlign of boxes rounded to whole pixels as in RoIPool (He et al. 2017, §3, Table 2c).

    Args:
        output_size: bins, `(PH, PW)` or one number for both.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        reduction: `"mean"` or `"max"` of the samples of a bin.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = -1,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        pooled = check_output_size(output_size)
        self.output_size = output_size
        self.spatial_scale = check_positive("spatial_scale", spatial_scale)
        self.sampling_ratio = check_sampling_ratio(sampling_ratio, pooled)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool each RoI; errors are those of `roi_warp`, where `rois` are named `boxes`.

        Args:
            input: `[N, C, H, W]` features, floating.
            rois: `[K, 5]` rows `(image, x1, y1, x2, y2)`, or a list of one `[L, 4]` per image, in image pixels. They
                receive no gradient.

        Returns:
            `[K, C, PH, PW]` in the input's dtype and memory format.
        """
        return roi_warp(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale},"
            f" sampling_ratio={self.sampling_ratio}, reduction={self.reduction!r}"
        )


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign from a dictionary of feature maps: `torchvision.ops.MultiScaleRoIAlign`, in one launch.

    Args:
        featmap_names: names of the entries to pool from. The dictionary must hold them finest first.
        output_size: bins, `(PH, PW)` or one number for both.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        canonical_scale, canonical_level: a box of this side, in image pixels, is pooled from this level (Lin et al.
            2017, Feature Pyramid Networks, eq. 1).
        aligned: shift boxes by half a feature pixel and allow sizes below 1 (detectron2's `ROIAlignV2`).
        reduction: `"mean"` or `"max"` of the samples of a bin.
        level_rounding: `"torchvision"` or `"detectron2"`: whose boundary between levels is reproduced exactly.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | tuple[int, int] | list[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        reduction: str = "mean",
        level_rounding: str = "torchvision",
    ) -> None:
        super().__init__()
        self.featmap_names = check_sequence("featmap_names", featmap_names, "names")
        self.output_size = check_output_size(output_size)
        self.sampling_ratio = check_sampling_ratio(sampling_ratio, self.output_size)
        self.canonical_scale = check_positive("canonical_scale", canonical_scale)
        self.canonical_level = check_int("canonical_level", canonical_level)
        self.aligned = check_flag("aligned", aligned)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.level_rounding = check_choice("level_rounding", level_rounding, ROUNDINGS)

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Pool each box from its level.

        Args:
            x: feature maps `[N, C, H_l, W_l]` by name.
            boxes: one `[K_n, 4]` per image, `(x1, y1, x2, y2)` in input pixels. They receive a gradient if they require
                one.
            image_shapes: `(height, width)` of each image of the batch, before padding. The scale of a level is its
                height divided by the largest image height, rounded to a power of two. It is inferred in each call, so
                images may change size; torchvision keeps the scales of the first call.

        Returns:
            `[K, C, PH, PW]`, in the order of the boxes, in the features' dtype and the first level's memory format.

        Raises:
            TypeError, ValueError: as `multiscale_roi_align`; and if `x` has none of the named levels, or
                `image_shapes` is empty.
        """
        features = select_levels(x, self.featmap_names)
        scales = infer_scales(features, image_shapes, self.level_rounding)
        return multiscale_roi_align(
            features,
            boxes,
            self.output_size,
            scales,
            self.sampling_ratio,
            self.aligned,
            reduction=self.reduction,
            canonical_box_size=self.canonical_scale,
            canonical_level=self.canonical_level,
            level_rounding=self.level_rounding,
        )

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
        )


@overridable
def select_levels(x: Any, names: Sequence[str]) -> list[Tensor]:
    """The named feature maps, in the dictionary's order."""
    if not isinstance(x, Mapping):
        raise TypeError(f"x: expected a mapping of names to feature maps, got {describe(x)}")
    selected = [feature for name, feature in x.items() if name in names]
    if not selected:
        raise ValueError(f"x: expected feature maps named {list(names)}, got {list(x)}")
    features = check_features("x", selected)
    if not all(feature.shape[2] for feature in features):
        raise ValueError(f"x: expected heights >= 1, got {[list(feature.shape) for feature in features]}")
    return features


@overridable
def infer_scales(features: Sequence[Tensor], image_shapes: Any, level_rounding: str) -> list[float]:
    """Feature pixels per image pixel of each level: the ratio of heights, rounded to a power of two."""
    shapes = check_sequence("image_shapes", image_shapes, "(height, width)")
    if not shapes:
        raise ValueError("image_shapes: expected one (height, width) per image, got none")
    height = max(check_pair("image_shapes", shape, least=1)[0] for shape in shapes)
    scales = [2.0 ** round(math.log2(feature.shape[2] / height)) for feature in features]
    check_levels("x", scales, level_rounding)
    return scales
