"""Detections of fastmask's and torchvision's detectors, brought to the host in one form, and whether they agree."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional

from fastmask import box_ops
from models.marks import mark
from models.network.mask_rcnn import MaskRCNN
from models.structures import Detections

HAS_PYCOCOTOOLS = importlib.util.find_spec("pycocotools") is not None

Masks = list[dict[str, Any]] | Tensor  # run-length encoded; without pycocotools, the pixels, `[N, H, W]` bool


@dataclass(frozen=True)
class HostDetections:
    """The detections of an image, on the host, best first."""

    boxes: Tensor  # [N, 4] float32
    scores: Tensor  # [N] float32
    labels: Tensor  # [N] int64
    masks: Masks | None
    keypoints: Tensor | None  # [N, P, 3]
    exact: bool  # computed in float32 throughout


@dataclass(frozen=True)
class Agreement:
    """How closely the detections of two detectors in an image have to agree."""

    best: float  # the part of the detections, by score, that counts
    share: float  # the share of them that needs a partner of the same label, and of the partners that have to agree
    iou: float  # of the partners' boxes
    score: float  # relative difference, rank by rank
    masks: float  # pixels that differ, over the area of the box
    keypoints: float  # pixels along an axis


EXACT = Agreement(best=1.0, share=0.98, iou=0.999, score=1e-3, masks=0.01, keypoints=0.02)
ROUNDED = Agreement(best=0.5, share=0.5, iou=0.7, score=0.3, masks=0.35, keypoints=8.0)


def detect(model: MaskRCNN, images: Sequence[Tensor], *, exact: bool | None = None) -> list[HostDetections]:
    """fastmask's detections.

    Args:
        model: on any device.
        images: uint8 RGB `[3, H, W]` each, on the host.
        exact: whether the model computes in float32; by default, derived from the state of autocast and TF32.
    """
    exact = _is_exact(model) if exact is None else exact
    results = []
    for detections in model.detect(images):
        assert len(detections) == model.config.box.detections
        masks = None if detections.mask_probabilities is None else _encode(detections)
        fields = detections.boxes, detections.scores, detections.labels
        results.append(_on_host(*fields, masks=masks, keypoints=detections.keypoints, exact=exact))
    return results


@torch.inference_mode()
def detect_torchvision(model: nn.Module, images: Sequence[Tensor]) -> list[HostDetections]:
    """torchvision's detections; `images` as in `detect`. Work outside the model has the marks of fastmask's stages."""
    device = next(model.parameters()).device
    exact = _is_exact(model)
    with mark("preprocess"):
        floats = [functional.to_dtype(image.to(device), torch.float32, scale=True) for image in images]
    results = []
    for output in model(floats):
        masks = None
        if "masks" in output:
            with mark("paste"):
                pixels = output["masks"][:, 0] >= 0.5
            with mark("RLE"):
                masks = _encode_one_by_one(pixels)
        fields = output["boxes"], output["scores"], output["labels"]
        results.append(_on_host(*fields, masks=masks, keypoints=output.get("keypoints"), exact=exact))
    return results


def _is_exact(model: nn.Module) -> bool:
    """Whether it computes in float32: neither under autocast nor, on a GPU, in TF32."""
    kind = next(model.parameters()).device.type
    return not torch.is_autocast_enabled(kind) and (kind == "cpu" or not torch.backends.cudnn.allow_tf32)


def _on_host(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, masks: Masks | None, keypoints: Tensor | None, exact: bool
) -> HostDetections:
    return HostDetections(
        boxes.float().cpu(),
        scores.float().cpu(),
        labels.cpu(),
        masks,
        None if keypoints is None else keypoints.cpu(),
        exact,
    )


def _encode(detections: Detections) -> Masks:
    """The masks of fastmask's detections."""
    return detections.rle()


def _encode_one_by_one(masks: Tensor) -> Masks:
    """Masks `[N, H, W]` encoded one by one, as in torchvision's evaluation."""
    if not HAS_PYCOCOTOOLS:
        return masks.cpu()
    from pycocotools import mask as coco_mask

    return [coco_mask.encode(np.array(mask, dtype=np.uint8, order="F")) for mask in masks.cpu().numpy()]


def same(detections: Sequence[HostDetections], expected: Sequence[HostDetections]) -> bool:
    """Whether two detectors of the same weights agree in each image."""
    return all(
        _agree(a, b, EXACT if a.exact and b.exact else ROUNDED) for a, b in zip(detections, expected, strict=True)
    )


def _agree(a: HostDetections, b: HostDetections, limit: Agreement) -> bool:
    if len(a.boxes) != len(b.boxes):
        return False
    # The best partner of any rank: boxes of equal scores may swap.
    overlap, index = (box_iou(a.boxes, b.boxes) * (a.labels[:, None] == b.labels)).max(1)
    overlap = overlap[: int(limit.best * len(overlap))]
    rows = (overlap > limit.iou).nonzero()[:, 0]
    index = index[rows]
    agrees = len(rows) >= limit.share * len(overlap)
    agrees &= bool(((a.scores - b.scores).abs() <= limit.score * a.scores).all())
    if a.masks is not None:
        assert b.masks is not None
        differ = (_pixels(a.masks)[rows] != _pixels(b.masks)[index]).sum((1, 2))
        agrees &= bool((differ <= limit.masks * box_ops.area(a.boxes[rows])).float().mean() >= limit.share)
    if a.keypoints is not None:
        assert b.keypoints is not None
        distance = (a.keypoints[rows] - b.keypoints[index]).abs().amax(-1)
        agrees &= bool((distance <= limit.keypoints).float().mean() >= limit.share)
    return agrees


def _pixels(masks: Masks) -> Tensor:
    """`[N, H, W]` bool."""
    if isinstance(masks, Tensor):
        return masks
    from pycocotools import mask as coco_mask

    return torch.from_numpy(coco_mask.decode(masks)).permute(2, 0, 1).bool()
