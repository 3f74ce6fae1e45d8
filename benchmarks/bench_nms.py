"""NMS of one list of boxes, of the levels of an RPN, and of the classes of a detector.

Bytes: boxes, scores and classes read, indices written. FLOPs: the comparisons that any greedy algorithm makes. Any two
boxes of a class that are kept are compared, and each dropped box is compared with a box that suppresses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Unpack
from unittest.mock import patch

import pytest
import torch
import torchvision
from torch import Tensor

import fastmask
from benchmarks import model_nms
from benchmarks.harness import operators
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison, Work
from benchmarks.harness.machine import PEERS, peer
from benchmarks.harness.pooling import torchvision_provider
from benchmarks.harness.timing import Implementation
from benchmarks.harness.workloads import (
    ADVERSARIAL,
    CLASSES,
    DTYPES,
    candidates,
    detections,
    disjoint,
    generator,
)
from benchmarks.reporting.results import FASTMASK
from fastmask.kernels.nms import bit_matrix, forward
from fastmask.kernels.nms.reference import nms_reference
from tests.oracles.nms import assert_same_indices, greedy_nms_padded
from tests.oracles.nms_variants import VARIANTS

IOU_FLOPS = 13  # 4 extrema, 2 differences, 2 clamps, 3 for the union, a product, a comparison
LEVELS = 5  # P2 to P6
DETECTIONS, SCORE = 100, 0.05  # §3.1


def work(tensors: Sequence[Tensor], kept: Sequence[int], dropped: int) -> Work:
    """Bytes and FLOPs.

    Args:
        tensors: the inputs.
        kept: the number of boxes kept, of each list or class.
        dropped: the number of boxes dropped, of all.
    """
    compared = sum(n * (n - 1) // 2 for n in kept) + dropped
    return {"bytes": sum(tensor.nbytes for tensor in tensors) + 8 * sum(kept), "flops": IOU_FLOPS * compared}


def compare_one_list(
    comparison: Comparison,
    name: str,
    boxes: Tensor,
    scores: Tensor,
    *,
    compiled: bool = False,
    **options: Unpack[CaseOptions],
) -> None:
    """Compare NMS of `[N, 4]` boxes; if `compiled`, with torch.compile of fastmask's reference as well."""
    dtype = str(boxes.dtype).removeprefix("torch.")
    boxes, scores = boxes.to(comparison.device), scores.to(comparison.device)

    def torchvision_nms() -> Tensor:
        with torch.autocast(boxes.device.type, enabled=dtype != "float32"):
            return torchvision.ops.nms(boxes, scores, 0.7)

    providers: dict[str, Implementation] = {
        FASTMASK: lambda: fastmask.nms(boxes, scores, 0.7),
        torchvision_provider(dtype): torchvision_nms,
    }
    if mmcv := peer(PEERS["mmcv"]):
        providers["mmcv"] = lambda: mmcv.nms(boxes, scores, 0.7)[1]
    if compiled and not comparison.on_gpu:
        providers["torch.compile"] = compiled_reference(boxes, scores)
    missing = {"torch.compile": "the reference of NMS is for CPUs"} if compiled and comparison.on_gpu else {}

    def same(indices: Tensor, expected: Tensor) -> bool:
        """Equal on a CPU. On a GPU, the compiler of torchvision's kernel may fuse multiplications and additions."""
        return _overlap(indices, expected) >= 0.999 if comparison.on_gpu else torch.equal(indices, expected)

    kept = len(fastmask.nms(boxes, scores, 0.7))
    needed = work([boxes, scores], [kept], len(boxes) - kept)
    comparison.run(name, providers, same, missing=missing, **needed, **options)


def compiled_reference(boxes: Tensor, scores: Tensor) -> Implementation:
    """torch.compile of fastmask's reference."""
    reference = torch.compile(nms_reference)
    return lambda: reference(boxes, scores, None, 0.7)


@pytest.mark.parametrize(
    ("count", "dtype", "target"),
    parameters(
        [
            (1000, "float32", {"cpu": 1 / 1.15, "gpu": 1}),
            (1000, "float16", None),
            (1000, "bfloat16", None),
            (10_000, "float32", {"cpu": 2, "gpu": 1}),
        ],
        quick=lambda count, *_: count == 1000,
    ),
)
def bench_one_list(comparison, count, dtype, target):
    boxes, scores = (tensor.to(DTYPES[dtype]) for tensor in candidates(count))
    compiled = (count, dtype) == (10_000, "float32")
    compare_one_list(comparison, f"{count:,} boxes, {dtype}", boxes, scores, target=target, compiled=compiled)


@pytest.mark.parametrize(("count", "images"), parameters([(1000, 1), (2000, 1), (1000, 8)], quick=lambda *_: True))
def bench_rpn(comparison, count, images):
    """The proposals of each level separately, as in an RPN; torchvision separates levels by an offset."""
    lists = images * LEVELS
    drawn = [candidates(count, seed=seed) for seed in range(lists)]
    boxes, scores = (torch.stack(tensors).to(comparison.device) for tensors in zip(*drawn, strict=True))
    level = torch.arange(lists, device=comparison.device)[:, None].expand(lists, count)

    def fastmask_nms() -> tuple[Tensor, Tensor]:
        return fastmask.nms_padded(boxes, scores, 0.7, count)

    def torchvision_nms() -> list[Tensor]:  # image by image
        parts = (tensor.split(LEVELS) for tensor in (boxes, scores, level))
        return [
            torchvision.ops.batched_nms(box.flatten(0, 1), score.flatten(), index.flatten(), 0.7)
            for box, score, index in zip(*parts, strict=True)
        ]

    def same(result: tuple[Tensor, Tensor], expected: list[Tensor]) -> bool:
        indices, _ = result
        kept = (indices + torch.arange(lists, device=comparison.device)[:, None] * count)[indices >= 0]
        peers_kept = torch.cat([index + image * LEVELS * count for image, index in enumerate(expected)])
        return _overlap(kept, peers_kept) >= 0.99  # the offset rounds IoUs, so that single boxes differ

    kept = fastmask_nms()[1].tolist()
    comparison.run(
        f"{lists} x {count} boxes of {images} RPN" + "s" * (images > 1),
        {FASTMASK: fastmask_nms, "torchvision": torchvision_nms},
        same,
        target={"gpu": 5} if (count, images) == (1000, 1) else None,
        **work([boxes, scores], kept, lists * count - sum(kept)),
    )


def bench_classes(comparison):
    """The best 100 detections of 1000 proposals in 80 classes, above a score of 0.05."""
    boxes, scores, classes = (tensor.to(comparison.device) for tensor in detections())

    def fastmask_nms() -> Tensor:
        indices, _ = fastmask.nms_padded(
            boxes[None], scores[None], 0.5, DETECTIONS, classes=classes[None], score_threshold=SCORE
        )
        return indices[0]  # there are more than DETECTIONS, so none is padding

    def torchvision_nms() -> Tensor:
        above = (scores > SCORE).nonzero()[:, 0]
        return above[torchvision.ops.batched_nms(boxes[above], scores[above], classes[above], 0.5)[:DETECTIONS]]

    def same(indices: Tensor, expected: Tensor) -> bool:
        return len(expected) == DETECTIONS and _overlap(indices, expected) >= 0.95

    kept = classes[fastmask_nms()].bincount(minlength=CLASSES).tolist()
    name = f"{DETECTIONS} detections of 1000 x {CLASSES} classes"
    # The result does not tell how many boxes are dropped before the hundredth detection.
    needed = work([boxes, scores, classes], kept, dropped=0)
    comparison.run(name, {FASTMASK: fastmask_nms, "torchvision": torchvision_nms}, same, **needed)


def _overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two sets of indices."""
    union = len(torch.cat([a, b]).unique())
    return (len(a) + len(b) - union) / union


CROWDS = ADVERSARIAL | {"none touches another": disjoint}


@pytest.mark.parametrize("boxes", parameters(zip(CROWDS), quick=lambda boxes: boxes == "all on one spot"))
def bench_adversarial(comparison, boxes):
    count = 5000
    scores = torch.rand(count, generator=generator(1))
    compare_one_list(comparison, f"{count:,} boxes, {boxes}", CROWDS[boxes](count), scores, kind="adversarial")


@pytest.mark.parametrize("count", parameters(zip([100, 1000, 10_000, 50_000, 200_000]), quick=lambda n: n <= 1000))
def bench_boxes(comparison, count):
    boxes, scores = candidates(count)
    compare_one_list(comparison, f"{count:,} boxes", boxes, scores, kind="scaling", axis="boxes", at=count)


def _calls(device: str, seed: int) -> list[operators.Call]:
    """One list; two padded lists, with few and with many results."""
    drawn = [tuple(tensor[:40] for tensor in candidates(300, seed=seed + i)) for i in range(2)]
    boxes, scores = (torch.stack(tensors).to(device) for tensors in zip(*drawn, strict=True))
    classes = torch.randint(0, 3, scores.shape, generator=generator(seed)).to(device)
    one = {"boxes": boxes[0], "scores": scores[0], "iou_threshold": 0.5}
    padded = {"boxes": boxes, "scores": scores, "iou_threshold": 0.5}
    options = {"classes": classes, "counts": torch.tensor([40, 25], device=device), "score_threshold": 0.02}
    return [
        operators.Call(fastmask.nms, one, dynamic=True),
        operators.Call(fastmask.batched_nms, one | {"idxs": classes[0]}, dynamic=True),
        operators.Call(fastmask.nms_padded, padded | {"max_output": 8}),
        operators.Call(fastmask.nms_padded, padded | options | {"max_output": 8}),
        operators.Call(fastmask.nms_padded, padded | options | {"max_output": forward.MAX_SINGLE_LAUNCH_OUTPUT + 1}),
    ]


def _compile_case(
    segments: int,
    boxes: int,
    max_output: int,
    score_threshold: float | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    by_class: bool = False,
) -> operators.Call:
    """Padded proposals of several levels, or one list, or detections by class."""
    meta, arguments = operators.meta, {"iou_threshold": 0.5, "max_output": max_output}
    tensors = {
        "boxes": meta(segments, boxes, 4, dtype=dtype),
        "scores": meta(segments, boxes, dtype=dtype),
        "classes": meta(segments, boxes, dtype=torch.int64) if by_class else None,
        "counts": meta(segments, dtype=torch.int64) if segments > 1 else None,
    }
    return operators.Call(fastmask.nms_padded, tensors | arguments | {"score_threshold": score_threshold})


def _check_random(draw: operators.Draw, device: str) -> None:
    """A random call keeps the boxes of a greedy loop, by either algorithm of the accelerator."""
    batch, n, max_output = draw.integer(1, 3), draw.integer(1, 140), draw.integer(0, 50)
    threshold, single_launch = draw.number(0, 1), draw.choice([False, True])
    g = generator(draw.integer(0, 1000))
    corner = torch.randint(-6, 6, (batch, n, 2), generator=g)  # coarse, so that IoUs and areas repeat
    boxes = torch.cat([corner, corner + torch.randint(-1, 8, (batch, n, 2), generator=g)], 2).float()
    scores = torch.randint(0, 20, (batch, n), generator=g) / 10
    classes = torch.randint(0, 3, (batch, n), generator=g)
    counts = torch.randint(0, n + 2, (batch,), generator=g)
    expected = greedy_nms_padded(boxes, scores, threshold, max_output, classes, counts, score_threshold=0.2)
    boxes, scores, classes, counts = (tensor.to(device) for tensor in (boxes, scores, classes, counts))
    with (
        patch.object(forward, "MAX_SINGLE_LAUNCH_OUTPUT", 50 if single_launch else -1),
        patch.object(bit_matrix, "MAX_CHUNK_ROWS", 64),
    ):
        actual = fastmask.nms_padded(
            boxes, scores, threshold, max_output, classes=classes, counts=counts, score_threshold=0.2
        )
    assert_same_indices(actual, expected)


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        "NMS of 5x1000": partial(_compile_case, 5, 1000, 1000),
        "NMS of 5x2000": partial(_compile_case, 5, 2000, 2000),
        "NMS of 10000": partial(_compile_case, 1, 10000, 10000),
        "NMS of 80000 by class, 100 kept": partial(_compile_case, 1, 80000, 100, 0.05, by_class=True),
        "NMS of 5x1000, float64": partial(_compile_case, 5, 1000, 1000, dtype=torch.float64),
        "NMS of 10000 by class": partial(_compile_case, 1, 10000, 10000, by_class=True),
        "NMS of 2000 by class": partial(_compile_case, 1, 2000, 2000, by_class=True),
    },
    limits={
        "gather_boxes_kernel": {"cuda": operators.Limit(24, slow_paths=0), "hip": operators.Limit(16)},
        "rank_boxes_kernel": {"cuda": operators.Limit(48, slow_paths=0), "hip": operators.Limit(24)},
        "scan_bits_kernel": {"cuda": operators.Limit(168, slow_paths=0), "hip": operators.Limit(120)},
        "scan_boxes_kernel": {"cuda": operators.Limit(88, slow_paths=0), "hip": operators.Limit(88)},
        "suppress_later_kernel": {"cuda": operators.Limit(48, slow_paths=0), "hip": operators.Limit(32)},
        "suppression_bits_kernel": {
            "cuda": operators.Limit(
                48,
                slow_paths=0,
                for_cases={"float64": operators.Limit(48)},  # IoUs of float64 boxes are divided
            ),
            "hip": operators.Limit(64),
        },
    },
    check_random=_check_random,
    models=model_nms.MODELS,
    targets=model_nms.TARGETS,
    fences=model_nms.FENCES,
    variants=VARIANTS,
)
