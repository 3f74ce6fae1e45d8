"""Targets of the mask head, 28 x 28, for the positive samples of two images (He et al. 2017, §3.1).

Bytes: the vertices or bitmaps of the objects, and boxes, matches and targets. FLOPs: about 20 operations for each
edge and column that it crosses, or a multiply-add for each of four neighbours of each sample.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes

import fastmask
from benchmarks import model_mask_targets
from benchmarks.harness import operators
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.timing import Implementation
from benchmarks.model_mask_targets import IMAGE, OBJECTS, ROIS, SIDE, draw_polygons, draw_rois
from benchmarks.reporting.results import FASTMASK
from fastmask import Masks
from tests.oracles.mask_targets import (
    VARIANTS,
    assert_sampled,
    bitmap_oracle,
    decode,
    draw_boxes,
    draw_rles,
    draw_segmentations,
    polygon_oracle,
)


def compare_polygons(comparison: Comparison, name: str, vertices: int, **options: Unpack[CaseOptions]) -> None:
    """Compare with detectron2's route: each RoI's polygons moved, scaled and rasterised by pycocotools on the host."""
    polygons, boxes, matches = draw_polygons(OBJECTS, vertices), *draw_rois()
    masks = Masks.from_coco(polygons, IMAGE).to(comparison.device)
    placed = boxes.to(comparison.device), matches.to(comparison.device)
    on_host = [[np.array(polygon) for polygon in polygons[match]] for match in matches.tolist()]

    def pycocotools() -> Tensor:
        return _by_pycocotools(on_host, placed[0]).to(comparison.device)

    providers: dict[str, Implementation] = {
        FASTMASK: lambda: fastmask.mask_targets(masks, *placed, SIDE),
        "pycocotools": pycocotools,
    }
    bytes = masks.vertices.nbytes + boxes.nbytes + matches.nbytes + ROIS * SIDE * SIDE * 4
    comparison.run(name, providers, torch.equal, bytes=bytes, flops=ROIS * vertices * 2 * 20, **options)


def _by_pycocotools(polygons: list[list[np.ndarray]], boxes: Tensor) -> Tensor:
    from pycocotools import mask as coco_mask

    targets = []
    for parts, box in zip(polygons, boxes.double().cpu().numpy(), strict=True):
        scale = SIDE / np.maximum(box[2:] - box[:2], 0.1)
        moved = [((part.reshape(-1, 2) - box[:2]) * scale).ravel().tolist() for part in parts]
        rle = coco_mask.merge(coco_mask.frPyObjects(moved, SIDE, SIDE))
        targets.append(torch.from_numpy(coco_mask.decode(rle)))
    return torch.stack(targets).float()


def compare_bitmaps(comparison: Comparison, name: str, form: str, **options: Unpack[CaseOptions]) -> None:
    """Compare with torchvision's `project_masks_on_boxes`, which converts all bitmaps to float32."""
    from pycocotools import mask as coco_mask

    boxes, matches = draw_rois()
    decoded = torch.stack([torch.from_numpy(decode(p, *IMAGE)) for p in draw_polygons(OBJECTS, 30)])
    if form == "RLE":
        rles = [coco_mask.encode(np.asfortranarray(bitmap)) for bitmap in decoded.numpy()]
        masks = Masks.from_coco(rles, IMAGE)
    else:
        masks = Masks.from_bitmaps(decoded)
    masks, decoded = masks.to(comparison.device), decoded.to(comparison.device)
    placed = boxes.to(comparison.device), matches.to(comparison.device)
    providers: dict[str, Implementation] = {
        FASTMASK: lambda: fastmask.mask_targets(masks, *placed, SIDE),
        "torchvision": lambda: project_masks_on_boxes(decoded, *placed, SIDE),
    }
    area = int((boxes[:, 2:] - boxes[:, :2]).prod(1).sum())
    data = masks.runs.nbytes if form == "RLE" else int(area)
    bytes = data + boxes.nbytes + matches.nbytes + ROIS * SIDE * SIDE * 4

    def same(actual: Tensor, expected: Tensor) -> bool:
        return bool((actual - expected).abs().max() < 1e-3)

    comparison.run(name, providers, same, bytes=bytes, flops=area * 4 * 2, **options)


@pytest.mark.quick
def bench_polygons(comparison):
    compare_polygons(comparison, f"{ROIS} RoIs {SIDE}x{SIDE}, polygons of 30 vertices", 30)


@pytest.mark.parametrize("vertices", [10, 100, 1000])
def bench_vertices(comparison, vertices):
    options: CaseOptions = {"kind": "scaling", "axis": "vertices", "at": vertices}
    compare_polygons(comparison, f"{ROIS} RoIs {SIDE}x{SIDE}, polygons of {vertices} vertices", vertices, **options)


@pytest.mark.parametrize("form", ["bitmaps", "RLE"])
def bench_bitmaps(comparison, form):
    compare_bitmaps(comparison, f"{ROIS} RoIs {SIDE}x{SIDE}, {form}", form)


def _calls(device: str, seed: int) -> list[operators.Call]:
    """A padded batch of all kinds of masks, and RoIs of one image."""
    random, image = np.random.default_rng(0), (20, 30)  # a graph is replayed with other RoIs of the same masks
    rles = draw_rles(random, 2, *image)
    decoded = torch.from_numpy(np.stack([decode(rle, *image) for rle in rles]))
    polygons = Masks.from_coco(draw_segmentations(random, 2, *image), image)
    mixed = Masks.cat([polygons, Masks.from_coco(rles, image), Masks.from_bitmaps(decoded)])
    random = np.random.default_rng(seed)
    boxes, matches = draw_boxes(random, 4, *image).to(device), torch.from_numpy(random.integers(-1, 6, 4)).to(device)
    options = {"size": (5, 6), "aligned": True, "sampling_ratio": 0}
    batch = {"masks": Masks.batch([mixed, polygons]).to(device)}
    of_images = {"boxes": boxes.view(2, 2, 4), "matches": matches.view(2, 2)}
    one = {"masks": polygons.to(device), "boxes": boxes, "matches": matches}
    return [operators.Call(fastmask.mask_targets, case | options) for case in (batch | of_images, one)]


def _compile_case(kind: str, side: int = SIDE) -> operators.Call:
    """RoIs of masks on the meta device."""
    size = (8, 8)
    masks = {
        "polygons": Masks.from_coco([[[0.0, 0.0, 5.0, 0.0, 5.0, 5.0]]], size),
        "RLE": Masks.from_coco([{"size": size, "counts": [10, 54]}], size),
        "bitmaps": Masks.from_bitmaps(torch.ones(1, *size, dtype=torch.uint8, device="cpu")),
    }
    chosen = Masks.cat(list(masks.values())) if kind == "all kinds" else masks[kind]
    tensors = {"boxes": operators.meta(ROIS, 4), "matches": operators.meta(ROIS, dtype=torch.int64)}
    return operators.Call(fastmask.mask_targets, {"masks": chosen.to("meta"), "size": side} | tensors)


def _check_random(draw: operators.Draw, device: str) -> None:
    """Random polygons have pycocotools' targets, random bitmaps and RLE torchvision's."""
    kind, count = draw.choice(("polygons", "bitmaps", "RLE")), draw.integer(1, 3)
    random = np.random.default_rng(draw.integer(0, 10**6))
    image, size = (draw.integer(1, 40), draw.integer(1, 40)), (draw.integer(1, 40), draw.integer(1, 12))
    boxes, aligned = draw_boxes(random, count, *image), draw.choice((True, False))
    arguments = boxes.to(device), torch.arange(count, device=device), size
    if kind == "polygons":
        segmentations = draw_segmentations(random, count, *image)
        actual = fastmask.mask_targets(Masks.from_coco(segmentations, image).to(device), *arguments).cpu()
        for target, polygons, box in zip(actual, segmentations, boxes, strict=True):
            assert torch.equal(target, polygon_oracle(polygons, box, size))
        return
    rles = draw_rles(random, count, *image)
    decoded = torch.from_numpy(np.stack([decode(rle, *image) for rle in rles]))
    masks = Masks.from_coco(rles, image) if kind == "RLE" else Masks.from_bitmaps(decoded)
    actual = fastmask.mask_targets(masks.to(device), *arguments, aligned=aligned).cpu()
    exact = torch.cat([bitmap_oracle(decoded[k], boxes[k : k + 1], size, aligned) for k in range(count)])
    assert_sampled(actual, exact, max(image))


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        f"{ROIS} RoIs 28x28, polygons": partial(_compile_case, "polygons"),
        f"{ROIS} RoIs 14x14, polygons": partial(_compile_case, "polygons", 14),
        f"{ROIS} RoIs 28x28, bitmaps": partial(_compile_case, "bitmaps"),
        f"{ROIS} RoIs 28x28, RLE": partial(_compile_case, "RLE"),
        f"{ROIS} RoIs 28x28, all kinds": partial(_compile_case, "all kinds"),
    },
    limits={
        "_polygon_targets_kernel": {"cuda": operators.Limit(80), "hip": operators.Limit(64)},
        "_bitmap_targets_kernel": {"cuda": operators.Limit(72), "hip": operators.Limit(56)},
    },
    check_random=_check_random,
    models=model_mask_targets.MODELS,
    targets=model_mask_targets.TARGETS,
    variants=VARIANTS,
)
