"""Detections of 1000 proposals of 80 classes: scores above 0.05, NMS at 0.5, the best 100 (He et al. 2017, §3.1).

Bytes: all logits and proposals; deltas of the candidates; detections, with their scores and labels. FLOPs: those of the
softmax. The comparisons of NMS have a section of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

import fastmask
from benchmarks import model_select_detections
from benchmarks.harness import operators
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.workloads import CLASSES, candidates, generator
from benchmarks.reporting.results import FASTMASK
from tests.oracles.decode import assert_selected
from tests.oracles.select_detections import (
    DETECTRON2,
    OPTIONS,
    TORCHVISION,
    VARIANTS,
    detections_oracle,
    draw_predictions,
)

PAPER: dict[str, Any] = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_detections": 100, "min_size": 1e-2}
PROPOSALS = 1000
SOFTMAX_FLOPS = 4  # of a logit: difference, exponential, sum, product


def _predictions(images: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits of a box head that takes most proposals for background, and small deltas of all columns."""
    g, rows = generator(), images * PROPOSALS
    class_logits = torch.randn(rows, 1 + CLASSES, generator=g) * 2
    class_logits[:, 0] += 6
    deltas = torch.randn(rows, 1 + CLASSES, 4, generator=g)
    proposals = torch.stack([candidates(PROPOSALS, seed=seed)[0] for seed in range(images)])
    counts, image_sizes = torch.full((images,), PROPOSALS), torch.tensor([[800, 1333]]).repeat(images, 1)
    tensors = (class_logits, deltas, proposals, counts, image_sizes)
    class_logits, deltas, proposals, counts, image_sizes = (tensor.to(device) for tensor in tensors)
    return class_logits, deltas, proposals, counts, image_sizes


@pytest.mark.parametrize("images", parameters(zip([1, 8]), quick=lambda images: images == 1))
def bench_detections(comparison: Comparison, images: int) -> None:
    class_logits, deltas, proposals, counts, image_sizes = _predictions(images, comparison.device)
    unused: Any = None  # pooler, head and predictor
    limits = PAPER["score_threshold"], PAPER["iou_threshold"], PAPER["max_detections"]
    heads = RoIHeads(unused, unused, unused, 0.5, 0.5, 512, 0.25, None, *limits)
    sizes, flat = [tuple(size) for size in image_sizes.tolist()], deltas.flatten(1)

    def fastmask_detections() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return fastmask.select_detections(class_logits, deltas, proposals, counts, image_sizes, **PAPER)

    def torchvision_detections() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return heads.postprocess_detections(class_logits, flat, list(proposals), sizes)

    def same(result: tuple[Tensor, ...], expected: tuple[list[Tensor], ...]) -> bool:
        """torchvision's NMS rounds IoUs by an offset for few boxes, and a GPU's `exp` rounds differently."""
        boxes, _, _, counts = result
        shares = []
        for box, count, others in zip(boxes, counts.tolist(), expected[0], strict=True):
            near = torch.cdist(box[:count], others, p=float("inf")).amin(1) < 1e-2
            shares.append(count == len(others) and near.float().mean() >= 0.95)
        return all(shares)

    candidates = round(model_select_detections.CANDIDATES * images * PROPOSALS)
    detections = images * PAPER["max_detections"]
    comparison.run(
        f"{images} x 100 detections of 1000 proposals and 80 classes",
        {FASTMASK: fastmask_detections, "torchvision": torchvision_detections},
        same,
        bytes=class_logits.nbytes + proposals.nbytes + candidates * 16 + detections * 28,
        flops=class_logits.numel() * SOFTMAX_FLOPS,
    )


def _calls(device: str, seed: int) -> list[operators.Call]:
    """Each of the three ways, on two images; and one box for all classes."""
    names = ("class_logits", "deltas", "proposals", "counts", "image_sizes")
    calls = []
    for boxes, options in ((4, OPTIONS), (5, TORCHVISION), (4, DETECTRON2), (1, OPTIONS)):
        inputs = [tensor.to(device) for tensor in draw_predictions(12, 4, 2, seed, boxes)]
        calls.append(operators.Call(fastmask.select_detections, dict(zip(names, inputs, strict=True)) | options))
    return calls


def _compile_case(
    boxes: int = CLASSES, dtype: torch.dtype = torch.float32, classes: int = CLASSES, **options: object
) -> operators.Call:
    inputs = {
        "class_logits": operators.meta(PROPOSALS, 1 + classes, dtype=dtype),
        "deltas": operators.meta(PROPOSALS, boxes, 4, dtype=dtype),
        "proposals": operators.meta(1, PROPOSALS, 4),
        "counts": operators.meta(1, dtype=torch.int64),
        "image_sizes": operators.meta(1, 2, dtype=torch.int64),
    }
    return operators.Call(fastmask.select_detections, inputs | PAPER | options)


def _check_random(draw: operators.Draw, device: str) -> None:
    """A random call agrees with the oracle, unless an IoU or a score is so close to its limit that rounding decides."""
    classes = draw.integer(1, 9)
    boxes = draw.choice([1, classes, classes + 1])
    options: dict[str, Any] = draw.choice([OPTIONS, TORCHVISION, DETECTRON2]) | {
        "score_threshold": draw.choice([0.01, 0.1, 0.3]),
        "max_detections": draw.integer(0, 30),
        "iou_threshold": draw.choice([0.0, 0.3, 0.7, 1.0]),
    }
    inputs = draw_predictions(draw.integer(0, 20), classes, draw.integer(1, 2), draw.integer(0, 10**6), boxes)
    expected = detections_oracle(*inputs, **options)
    for name, nudge in (("iou_threshold", 1e-5), ("score_threshold", 1e-6)):
        for sign in (-1, 1):
            nearby = detections_oracle(*inputs, **options | {name: options[name] + sign * nudge})
            if not torch.equal(nearby[0], expected[0]):
                return
    assert_selected(fastmask.select_detections(*(x.to(device) for x in inputs), **options), expected, 100)


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        "detections of 1000 x 80": _compile_case,
        "detections of 1000 x 80, torchvision": partial(_compile_case, 1 + CLASSES),
        "detections of 1000 x 80, bfloat16": partial(_compile_case, dtype=torch.bfloat16),
        "detections of 1000 x 80, detectron2": partial(_compile_case, background="last", drop_non_finite=True),
        "detections of 1000 x 1203, class-agnostic": partial(
            _compile_case, 1, classes=1203, score_threshold=1e-4, max_detections=300
        ),
    },
    limits={
        "score_proposals_kernel": {"cuda": operators.Limit(80, slow_paths=0), "hip": operators.Limit(64)},
        "list_candidates_kernel": {"cuda": operators.Limit(40, slow_paths=0), "hip": operators.Limit(40)},
        "order_candidates_kernel": {"cuda": operators.Limit(48, slow_paths=0), "hip": operators.Limit(24)},
        "gather_detections_kernel": {"cuda": operators.Limit(32, slow_paths=0), "hip": operators.Limit(32)},
    },
    check_random=_check_random,
    models=model_select_detections.MODELS,
    targets=model_select_detections.TARGETS,
    variants=VARIANTS,
)
