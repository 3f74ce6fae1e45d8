"""The registered operator of mask targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import register
from fastmask.kernels.mask_targets.bitmap_kernel import launch_bitmaps
from fastmask.kernels.mask_targets.bitmaps import sample
from fastmask.kernels.mask_targets.polygon_kernel import launch_polygons
from fastmask.kernels.mask_targets.polygons import rasterize
from fastmask.masks import POLYGONS


class MaskTargetsSpec(NamedTuple):
    """The settings of `mask_targets`, as its public function documents them."""

    height: int
    width: int
    aligned: bool
    sampling_ratio: int


def mask_targets_reference(
    vertices: Tensor,
    parts: Tensor,
    runs: Tensor,
    pixels: Tensor,
    objects: Tensor,
    transforms: Tensor,
    offsets: Tensor | None,
    boxes: Tensor,
    matches: Tensor,
    spec: MaskTargetsSpec,
) -> Tensor:
    """Targets `[..., H, W]` of boxes `[..., 4]`; the tensors of `Masks`, of which `offsets` is None for `[K, 4]`."""
    size = spec.height, spec.width
    flat, match = boxes.reshape(-1, 4), matches.flatten()
    first, count = match.new_zeros(()), match.new_full((), len(objects))
    if offsets is not None:
        first, count = (values.repeat_interleave(boxes.shape[1]) for values in (offsets[:-1], offsets.diff()))
    valid = (match >= 0) & (match < count) & flat.isfinite().all(1)
    out = torch.zeros(len(flat), *size, dtype=torch.float32, device=boxes.device)
    if not len(objects):
        return out.view(*matches.shape, *size)
    object = (first + match).where(valid, 0)
    is_polygons = objects[object, 0] == POLYGONS
    selected = (valid & is_polygons).nonzero()[:, 0]
    if len(selected):
        polygons = objects[object[selected]]
        targets = rasterize(vertices, parts, flat[selected].double(), polygons[:, 1], polygons[:, 2], size)
        out = targets if len(selected) == len(out) else out.index_copy_(0, selected, targets)
    selected = (valid & ~is_polygons).nonzero()[:, 0]
    if len(selected):
        object, sampled = object[selected], flat[selected].float()
        settings = size, spec.aligned, spec.sampling_ratio
        out.index_copy_(0, selected, sample(pixels, runs, objects[object], transforms[object], sampled, *settings))
    return out.view(*matches.shape, *size)


def _launch_mask_targets(
    vertices: Tensor,
    parts: Tensor,
    runs: Tensor,
    pixels: Tensor,
    objects: Tensor,
    transforms: Tensor,
    offsets: Tensor | None,
    boxes: Tensor,
    matches: Tensor,
    spec: MaskTargetsSpec,
) -> Tensor:
    out = torch.empty(*matches.shape, spec.height, spec.width, dtype=torch.float32, device=boxes.device)
    if not out.numel():
        return out
    objects, boxes, matches = objects.contiguous(), boxes.contiguous(), matches.contiguous()
    slots = matches.shape[-1]
    with_bitmaps = runs.numel() > 0 or pixels.numel() > 0
    with_polygons = parts.numel() > 0 or not with_bitmaps
    if with_polygons:  # zeros too, where there is no object or another kind of object
        launch_polygons(vertices, parts, objects, boxes, matches, offsets, out, slots, (spec.height, spec.width))
    if with_bitmaps:
        launch_bitmaps(
            pixels, runs, objects, transforms, boxes, matches, offsets, out, slots, spec, zeros=not with_polygons
        )
    return out


def _fake_mask_targets(
    _vertices: Tensor,
    _parts: Tensor,
    _runs: Tensor,
    _pixels: Tensor,
    _objects: Tensor,
    _transforms: Tensor,
    _offsets: Tensor | None,
    boxes: Tensor,
    matches: Tensor,
    spec: MaskTargetsSpec,
) -> Tensor:
    return boxes.new_empty(*matches.shape, spec.height, spec.width, dtype=torch.float32)


mask_targets_operator = register(
    "mask_targets(Tensor vertices, Tensor parts, Tensor runs, Tensor pixels, Tensor objects, Tensor transforms,"
    " Tensor? offsets, Tensor boxes, Tensor matches, *spec) -> Tensor",
    reference=mask_targets_reference,
    launch=_launch_mask_targets,
    fake=_fake_mask_targets,
    spec=MaskTargetsSpec,
)
