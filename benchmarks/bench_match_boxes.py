"""Matching the anchors of an RPN, and the proposals of a box head, to the ground truth (Ren et al. 2015, §3.1.2).

Bytes: boxes and ground truth read, matches and labels written. FLOPs: an IoU of each box and object.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

import fastmask
from benchmarks import model_match_boxes
from benchmarks.harness import operators
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.timing import Implementation
from benchmarks.harness.workloads import candidates, generator, objects
from benchmarks.model_match_boxes import anchors
from benchmarks.reporting.results import FASTMASK
from tests.oracles.match_boxes import THRESHOLDS, VARIANTS, draw_boxes, padded, torchvision_oracle

IOU_FLOPS = 13  # 4 extrema, 2 differences, 2 clamps, 3 for the union, a product, a quotient
ANCHOR_THRESHOLDS, PROPOSAL_THRESHOLDS = (0.7, 0.3), (0.5, 0.5)
OBJECTS, PROPOSALS = 100, 2000


def compare(
    comparison: Comparison,
    name: str,
    boxes: Tensor,
    gt_boxes: Tensor,
    thresholds: tuple[float, float],
    *,
    low_quality: bool,
    **options,
) -> None:
    """Compare the matching of `[N, 4]` boxes with torchvision's, image by image as it matches them."""
    batch, count = gt_boxes.shape[:2]
    boxes, gt_boxes = boxes.to(comparison.device), gt_boxes.to(comparison.device)
    counts = torch.full((batch,), count, device=comparison.device)
    matcher = Matcher(*thresholds, low_quality)

    def torchvision_matches() -> list[Tensor]:
        return [matcher(box_iou(gt, boxes)) for gt in gt_boxes]

    providers: dict[str, Implementation] = {
        FASTMASK: lambda: fastmask.match_boxes(boxes, gt_boxes, counts, *thresholds, low_quality=low_quality),
        "torchvision": torchvision_matches,
    }

    def same(result: tuple[Tensor, Tensor], expected: list[Tensor]) -> bool:
        """torchvision's negative matches are labels. On a GPU its compiled kernels may fuse additions."""
        matches, labels = result
        peers = torch.stack(expected)
        label = torch.where(peers >= 0, 1, torch.where(peers == Matcher.BELOW_LOW_THRESHOLD, 0, -1))
        different = (labels != label) | ((label == 1) & (matches != peers))
        return int(different.sum()) <= (1e-5 * labels.numel() if comparison.on_gpu else 0)

    bytes = boxes.nbytes + gt_boxes.nbytes + batch * len(boxes) * 9
    flops = batch * len(boxes) * count * IOU_FLOPS
    comparison.run(name, providers, same, bytes=bytes, flops=flops, **options)


@pytest.mark.parametrize(
    ("images", "count"), parameters([(1, OBJECTS), (2, OBJECTS), (2, 7)], quick=lambda i, _: i == 1)
)
def bench_anchors(comparison, images, count):
    gt_boxes = torch.stack([objects(count, seed=seed) for seed in range(images)])
    boxes = anchors()
    name = f"{len(boxes):,} anchors, {images} x {count} objects"
    target = {"cpu": 2, "gpu": 5} if (images, count) == (1, OBJECTS) else None
    compare(comparison, name, boxes, gt_boxes, ANCHOR_THRESHOLDS, low_quality=True, target=target)


def bench_proposals(comparison):
    boxes = candidates(PROPOSALS)[0]
    name = f"{PROPOSALS:,} proposals, {OBJECTS} objects"
    compare(comparison, name, boxes, objects(OBJECTS)[None], PROPOSAL_THRESHOLDS, low_quality=False)


@pytest.mark.parametrize("order", ["shuffled", "all alike"])
def bench_adversarial(comparison, order):
    """Anchors in no order, whose tiles touch all objects; and boxes that are all the best of every object."""
    boxes = (
        anchors()[torch.randperm(model_match_boxes.ANCHORS, generator=generator())[:20_000]]
        if order == "shuffled"
        else objects(1).repeat(20_000, 1)
    )
    name = f"20,000 boxes, {order}, {OBJECTS} objects"
    compare(comparison, name, boxes, objects(OBJECTS)[None], ANCHOR_THRESHOLDS, low_quality=True, kind="adversarial")


@pytest.mark.parametrize("count", parameters(zip([1, 10, 100, 400]), quick=lambda count: count <= 10))
def bench_objects(comparison, count):
    boxes = anchors()
    name = f"{len(boxes):,} anchors, {count} object{'s' * (count > 1)}"
    gt_boxes = objects(count)[None]
    options = {"kind": "scaling", "axis": "objects", "at": count}
    compare(comparison, name, boxes, gt_boxes, ANCHOR_THRESHOLDS, low_quality=True, **options)


def _calls(device: str, seed: int) -> list[operators.Call]:
    """Anchors shared by two images, and boxes of each image with counts and crowds."""
    boxes = torch.stack([draw_boxes(150, seed + i) for i in range(2)]).to(device)
    gt_boxes, gt_counts = (tensor.to(device) for tensor in padded([draw_boxes(5, seed), draw_boxes(2, seed + 9)], 6))
    arguments = {
        "gt_boxes": gt_boxes,
        "gt_counts": gt_counts,
        "high_threshold": THRESHOLDS[0],
        "low_threshold": THRESHOLDS[1],
    }
    counts = torch.tensor([150, 90], device=device)
    options = {"counts": counts, "crowds": gt_boxes.flip(0).nan_to_num(5.0), "crowd_counts": gt_counts}
    return [
        operators.Call(fastmask.match_boxes, {"boxes": boxes[0]} | arguments | {"low_quality": True}),
        operators.Call(fastmask.match_boxes, {"boxes": boxes} | arguments | options),
    ]


def _anchor_case(images: int, dtype: torch.dtype = torch.float32) -> operators.Call:
    meta = operators.meta
    arguments = {
        "boxes": meta(model_match_boxes.ANCHORS, 4, dtype=dtype),
        "gt_boxes": meta(images, OBJECTS, 4, dtype=dtype),
        "gt_counts": meta(images, dtype=torch.int64),
        "high_threshold": ANCHOR_THRESHOLDS[0],
        "low_threshold": ANCHOR_THRESHOLDS[1],
        "low_quality": True,
        "crowds": meta(images, 8, 4, dtype=dtype),
        "crowd_counts": meta(images, dtype=torch.int64),
    }
    return operators.Call(fastmask.match_boxes, arguments)


def _proposal_case(images: int) -> operators.Call:
    meta = operators.meta
    arguments = {
        "boxes": meta(images, PROPOSALS + OBJECTS, 4),
        "gt_boxes": meta(images, OBJECTS, 4),
        "gt_counts": meta(images, dtype=torch.int64),
        "high_threshold": PROPOSAL_THRESHOLDS[0],
        "low_threshold": PROPOSAL_THRESHOLDS[1],
        "counts": meta(images, dtype=torch.int64),
        "crowds": meta(images, 8, 4),
        "crowd_counts": meta(images, dtype=torch.int64),
    }
    return operators.Call(fastmask.match_boxes, arguments)


def _check_random(draw: operators.Draw, device: str) -> None:
    """A random image is matched as by torchvision."""
    n, count, extent = draw.integer(1, 400), draw.integer(1, 40), draw.integer(6, 90)
    low, high = sorted([draw.number(0.05, 0.95), draw.number(0.05, 0.95)])
    low_quality, seed = draw.choice([False, True]), draw.integer(0, 1000)
    boxes, gt = draw_boxes(n, seed, extent), draw_boxes(count, seed + 1, extent)
    expected = torchvision_oracle(boxes, gt, high, low, low_quality)
    arguments = boxes.to(device), gt[None].to(device), torch.tensor([count], device=device)
    actual = fastmask.match_boxes(*arguments, high, low, low_quality=low_quality)
    assert torch.equal(actual[0][0].cpu(), expected[0])
    assert torch.equal(actual[1][0].cpu(), expected[1])


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        "2 x 268,569 anchors, 100 objects": partial(_anchor_case, 2),
        "2 x 268,569 anchors, 100 objects, float64": partial(_anchor_case, 2, torch.float64),
        "2 x 2,100 proposals, 100 objects": partial(_proposal_case, 2),
    },
    limits={
        "match_boxes_kernel": {
            "cuda": operators.Limit(64, wide_loads=True, for_cases={"float64": operators.Limit(96)}),
            "hip": operators.Limit(56),
        },
        "label_best_kernel": {
            "cuda": operators.Limit(56, for_cases={"float64": operators.Limit(72)}),
            "hip": operators.Limit(56),
        },
    },
    check_random=_check_random,
    models=model_match_boxes.MODELS,
    targets=model_match_boxes.TARGETS,
    variants=VARIANTS,
)
