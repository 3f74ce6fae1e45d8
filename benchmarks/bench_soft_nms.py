"""Soft NMS of a detector's boxes, 100 results (Bodla et al. 2017).

No peer has one on a GPU. It is compared with the loop that other projects write with PyTorch's operators, one pass over
all boxes for each result, and with a loop in plain Python.

Bytes: boxes, scores and classes read, results written. FLOPs: an IoU and a product for each selected box and each
other box of its class that is not selected before it; implementations that look at fewer boxes do less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

import fastmask
from benchmarks import model_soft_nms
from benchmarks.harness import operators
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.machine import PEERS, peer
from benchmarks.harness.timing import Implementation
from benchmarks.harness.workloads import ADVERSARIAL, candidates, detections, generator
from benchmarks.reporting.results import FASTMASK
from fastmask.kernels.soft_nms import METHODS, forward
from tests.oracles.soft_nms import VARIANTS, check_soft_nms, soft_nms_by_hand

IOU_FLOPS = 15  # 4 extrema, 2 differences, 2 clamps, 3 for the union, a product, a division, a decay, a product
RESULTS, SCORE = 100, 0.05  # §3.1
OPTIONS: dict[str, Any] = {"iou_threshold": 0.3, "sigma": 0.5, "score_threshold": 0.001}  # the paper's


def torch_loop(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, method: str, score_threshold: float
) -> tuple[Tensor, Tensor]:
    """Indices and scores of `[N, 4]` boxes by PyTorch's operators: an argmax and a pass over all boxes for each."""
    scores = torch.where(scores >= score_threshold, scores, -torch.inf)
    indices, selected = [], []
    for _ in range(min(RESULTS, len(boxes))):
        best = scores.argmax()
        indices.append(best)
        selected.append(scores[best])
        iou = box_iou(boxes[best][None], boxes)[0]
        if classes is not None:
            iou = iou * (classes == classes[best])
        if method == "linear":
            weight = torch.where(iou > OPTIONS["iou_threshold"], 1 - iou, 1)
        else:
            weight = torch.exp(-iou * iou / OPTIONS["sigma"])
        scores = scores * weight
        scores = torch.where(scores >= score_threshold, scores, -torch.inf)
        scores[best] = -torch.inf
    found = torch.stack(selected)
    none = found == -torch.inf
    return torch.stack(indices).masked_fill(none, -1), found.masked_fill(none, 0)


def compare(
    comparison: Comparison,
    name: str,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None = None,
    *,
    method: str = "linear",
    score_threshold: float = OPTIONS["score_threshold"],
    python: bool = False,
    **options: Unpack[CaseOptions],
) -> None:
    """Compare soft NMS of one segment, `[N, 4]` boxes; if `python`, with a loop in plain Python as well."""
    settings = OPTIONS | {"method": method, "score_threshold": score_threshold, "max_output": RESULTS}
    boxes, scores = boxes.to(comparison.device), scores.to(comparison.device)
    classes = None if classes is None else classes.to(comparison.device)
    batched = None if classes is None else classes[None]

    def fastmask_soft_nms() -> tuple[Tensor, Tensor]:
        indices, selected = fastmask.soft_nms(boxes[None], scores[None], classes=batched, **settings)
        return indices[0], selected[0]

    providers: dict[str, Implementation] = {
        FASTMASK: fastmask_soft_nms,
        "torch loop": lambda: torch_loop(boxes, scores, classes, method, score_threshold),
    }
    if python:
        names = None if classes is None else classes.tolist()
        on_host = boxes.cpu(), scores.cpu()
        providers["Python"] = lambda: tuple(map(torch.tensor, soft_nms_by_hand(*on_host, names, settings)))
    mmcv = peer(PEERS["mmcv"])
    if mmcv and classes is None and not comparison.on_gpu:  # its operator has no limit on the results
        providers["mmcv"] = lambda: _mmcv(mmcv.soft_nms, boxes, scores, settings)

    def same(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
        """Scores agree; so do indices, except where scores differ by rounding alone."""
        (indices, selected), (others, other_scores) = result, expected
        others, other_scores = others.to(indices.device), other_scores.to(selected)
        if len(others) != len(indices) or (indices != others).double().mean() > 0.02:
            return False
        return bool(((selected - other_scores).abs() <= 1e-5 * selected.abs()).all())

    inputs = [boxes, scores] + ([] if classes is None else [classes])
    flops = IOU_FLOPS * RESULTS * len(boxes)
    needed = sum(tensor.nbytes for tensor in inputs) + 12 * RESULTS
    comparison.run(name, providers, same, bytes=needed, flops=flops, **options)


def _mmcv(
    soft_nms: Callable[..., tuple[Tensor, Tensor]], boxes: Tensor, scores: Tensor, settings: dict
) -> tuple[Tensor, Tensor]:
    options = {"sigma": settings["sigma"], "min_score": settings["score_threshold"], "method": settings["method"]}
    detections, indices = soft_nms(boxes, scores, settings["iou_threshold"], **options)
    return indices[:RESULTS], detections[:RESULTS, 4]


@pytest.mark.parametrize(
    ("count", "method"),
    parameters([(1000, "linear"), (1000, "gaussian"), (10_000, "linear")], quick=lambda _, method: method == "linear"),
)
def bench_one_class(comparison, count, method):
    boxes, scores = candidates(count)
    compare(comparison, f"{count:,} boxes, {method}", boxes, scores, method=method, python=count == 1000)


def bench_classes(comparison):
    """The best 100 detections of 1000 proposals in 80 classes, above a score of 0.05."""
    name = f"{RESULTS} detections of 1000 x 80 classes, linear"
    compare(comparison, name, *detections(), score_threshold=SCORE)


@pytest.mark.parametrize("boxes", ADVERSARIAL)
def bench_adversarial(comparison, boxes):
    scores = torch.rand(5000, generator=generator(1)) + 0.5
    name = f"5,000 boxes, {boxes}, gaussian"
    compare(comparison, name, ADVERSARIAL[boxes](5000), scores, method="gaussian", kind="adversarial")


@pytest.mark.parametrize("count", [100, 1000, 10_000, 50_000])
def bench_boxes(comparison, count):
    boxes, scores = candidates(count)
    compare(comparison, f"{count:,} boxes", boxes, scores, kind="scaling", axis="boxes", at=count)


def _calls(device: str, seed: int) -> list[operators.Call]:
    """Both methods; classes and counts; more boxes than a tile holds."""
    boxes, scores = (tensor[None, :40].to(device) for tensor in candidates(300, seed=seed))
    many_boxes, many_scores = (tensor[None].to(device) for tensor in candidates(forward.MAX_TILE + 50, seed=seed))
    plain = {"boxes": boxes, "scores": scores, "iou_threshold": 0.3, "max_output": 8}
    options = {
        "method": "gaussian",
        "sigma": 0.4,
        "score_threshold": 0.02,
        "classes": torch.randint(0, 3, scores.shape, generator=generator(seed)).to(device),
        "counts": torch.tensor([25], device=device),
    }
    return [
        operators.Call(fastmask.soft_nms, plain),
        operators.Call(fastmask.soft_nms, plain | options),
        operators.Call(fastmask.soft_nms, plain | {"boxes": many_boxes, "scores": many_scores}),
    ]


def _compile_case(
    boxes: int, method: str, dtype: torch.dtype = torch.float32, *, by_class: bool = False, segments: int = 1
) -> operators.Call:
    tensors = {
        "boxes": operators.meta(segments, boxes, 4, dtype=dtype),
        "scores": operators.meta(segments, boxes, dtype=dtype),
        "classes": operators.meta(segments, boxes, dtype=torch.int64) if by_class else None,
        "counts": operators.meta(segments, dtype=torch.int64) if segments > 1 else None,
    }
    return operators.Call(fastmask.soft_nms, tensors | OPTIONS | {"method": method, "max_output": RESULTS})


def _check_random(draw: operators.Draw, device: str) -> None:
    """A random call agrees with the loop up to rounding."""
    n, segments = draw.integer(1, 140), draw.integer(1, 3)
    g = generator(draw.integer(0, 1000))
    corner = torch.randint(-6, 6, (segments, n, 2), generator=g)  # coarse, so that IoUs and areas repeat
    boxes = torch.cat([corner, corner + torch.randint(-1, 8, (segments, n, 2), generator=g)], 2).float()
    check_soft_nms(
        device,
        boxes=boxes,
        scores=torch.randint(0, 20, (segments, n), generator=g) / 10,
        n=n,
        segments=segments,
        classes=draw.choice([None, torch.int64]),
        counts=[draw.integer(-1, n + 1) for _ in range(segments)],
        max_output=draw.integer(0, 50),
        method=draw.choice(METHODS),
        iou_threshold=draw.number(0, 1),
        sigma=math.exp(draw.number(-3, 3)),
        score_threshold=draw.choice([0.0, 0.2]),
        max_tile=128,
        min_window=16,
        exact=False,
    )


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        "soft NMS of 1000, linear": partial(_compile_case, 1000, "linear"),
        "soft NMS of 1000, gaussian": partial(_compile_case, 1000, "gaussian"),
        "soft NMS of 2000, linear": partial(_compile_case, 2000, "linear"),
        "soft NMS of 8x100 by class, linear": partial(_compile_case, 100, "linear", by_class=True, segments=8),
        "soft NMS of 80000 by class, linear": partial(_compile_case, 80_000, "linear", by_class=True),
        "soft NMS of 10000, gaussian": partial(_compile_case, 10_000, "gaussian"),
        "soft NMS of 1000, linear, float64": partial(_compile_case, 1000, "linear", torch.float64),
    },
    limits={
        "_soft_nms_kernel": {
            "cuda": operators.Limit(
                80,
                # Segments longer than a tile; float64.
                for_cases={"0000": operators.Limit(120), "float64": operators.Limit(112)},
            ),
            "hip": operators.Limit(72),
        },
    },
    check_random=_check_random,
    models=model_soft_nms.MODELS,
    targets=model_soft_nms.TARGETS,
    variants=VARIANTS,
)
