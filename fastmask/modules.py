"""The pooling operators as `nn.Module`s, with torchvision's constructors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fastmask.kernels._rois import check_output_size
from fastmask.kernels.roi_align import multiscale_roi_align, roi_align
from fastmask.kernels.roi_pool import roi_pool
from fastmask.kernels.roi_warp import roi_warp


class RoIAlign(nn.Module):
    """See `roi_align`."""

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
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.reduction = reduction

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
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
    """See `roi_pool`."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


class RoIWarp(nn.Module):
    """See `roi_warp`."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = -1,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.reduction = reduction

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
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
    """`torchvision.ops.MultiScaleRoIAlign`: pools boxes from a dictionary of feature maps.

    Args:
        featmap_names: which entries of the dictionary to pool from, in its order, finest first.
        output_size: bins, `(PH, PW)` or one number for both.
        sampling_ratio: samples per bin and axis; 0 or less: `ceil(bin size)`.
        canonical_scale, canonical_level: a box of this side, in pixels, is pooled from this level.
        aligned, reduction, level_rounding: see `multiscale_roi_align`.
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
        self.featmap_names = list(featmap_names)
        self.output_size = check_output_size(output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.aligned = aligned
        self.reduction = reduction
        self.level_rounding = level_rounding

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Pool `boxes`, one `[L, 4]` per image in input pixels, from the maps `x`.

        `image_shapes` are the `(height, width)` of the images in the batch; the scale of each map is the power
        of two nearest to its height over theirs. It is found anew each time, so images may change size.
        """
        features = pyramid(x, self.featmap_names)
        return multiscale_roi_align(
            features,
            boxes,
            self.output_size,
            infer_scales(features, image_shapes),
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


def pyramid(features: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The maps that are named, in the dictionary's order."""
    found = [feature for name, feature in features.items() if name in names]
    if not found:
        raise ValueError(f"x: expected feature maps named {list(names)}, got {list(features)}")
    return found


def infer_scales(features: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> list[float]:
    """Feature pixels per image pixel of each map: the nearest power of two, by height."""
    if not image_shapes:
        raise ValueError("image_shapes: expected one (height, width) per image, got none")
    height = max(shape[0] for shape in image_shapes)
    return [2.0 ** round(math.log2(feature.shape[-2] / height)) for feature in features]
