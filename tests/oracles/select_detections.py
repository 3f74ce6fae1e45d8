"""Inputs of `select_detections`, its result in float64 by loops over images, and the kernels' variants."""

from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from fastmask import select_detections
from fastmask.kernels.select_detections import order
from tests.oracles.decode import assert_selected, decode_oracle, is_valid, pad
from tests.oracles.nms import greedy_nms

NAN, INF = float("nan"), float("inf")
IMAGE = (60, 90)
OPTIONS: dict[str, Any] = {"score_threshold": 0.1, "iou_threshold": 0.5, "max_detections": 20}
TORCHVISION: dict[str, Any] = OPTIONS | {"min_size": 1e-2}
DETECTRON2: dict[str, Any] = OPTIONS | {"background": "last", "drop_non_finite": True}


def draw_predictions(proposals, classes, batch=1, seed=0, boxes=None, image=IMAGE):
    """Class logits, deltas of `boxes` boxes (K unless given), proposals, counts and image sizes."""
    g = torch.Generator().manual_seed(seed)
    limit = torch.tensor([image[1], image[0]])
    centre = torch.rand(batch, proposals, 2, generator=g) * limit
    half = torch.exp(torch.randn(batch, proposals, 2, generator=g) * 0.5) * 9.0
    rows, boxes = batch * proposals, classes if boxes is None else boxes
    return (
        torch.randn(rows, 1 + classes, generator=g) * 1.5,
        torch.randn(rows, boxes, 4, generator=g),
        torch.cat([centre - half, centre + half], 2),
        (proposals - torch.arange(batch) * 3).clamp(min=0),
        torch.tensor(image) - torch.arange(batch)[:, None] * torch.tensor([5, 7]),
    )


def detections_oracle(
    class_logits,
    deltas,
    proposals,
    counts,
    image_sizes,
    *,
    score_threshold,
    iou_threshold,
    max_detections,
    min_size=None,
    min_size_inclusive=True,
    weights=(10.0, 10.0, 5.0, 5.0),
    score_activation="softmax",
    background="first",
    drop_non_finite=False,
):
    """Image by image: all boxes of all classes are decoded, then filtered."""
    (batch, n), columns = proposals.shape[:2], class_logits.shape[1]
    first = int(background == "first")
    deltas = deltas[:, None] if deltas.ndim == 2 else deltas
    num_boxes = deltas.shape[1]
    results = []
    for b in range(batch):
        rows = slice(b * n, b * n + max(min(int(counts[b]), n), 0))
        logits = class_logits[rows].double()
        scores = logits.softmax(1) if score_activation == "softmax" else logits.sigmoid()
        anchors = proposals[b, : len(logits), None].expand(-1, num_boxes, 4)
        boxes, clipped = decode_oracle(deltas[rows].flatten(0, 1), anchors.flatten(0, 1), image_sizes[b], weights)
        valid = is_valid(boxes, clipped, min_size, min_size_inclusive, drop_non_finite).view(-1, num_boxes)
        if drop_non_finite:
            valid &= boxes.isfinite().all(1).view(-1, num_boxes).all(1, keepdim=True)
            valid &= scores.isfinite().all(1, keepdim=True)
        clipped = clipped.view(-1, num_boxes, 4)
        if num_boxes < columns:
            spread = max(columns - 1, 0)
            valid, clipped = valid.expand(-1, spread), clipped.expand(-1, spread, 4)
        else:
            valid, clipped = (x[:, first : first + columns - 1] for x in (valid, clipped))
        scores = scores[:, first : first + columns - 1]
        row, column = (valid & (scores > score_threshold)).nonzero(as_tuple=True)
        box, score, label = clipped[row, column], scores[row, column], column + first
        kept = greedy_nms(box, score, iou_threshold, label)[:max_detections]
        results.append((box[kept], score[kept], label[kept]))
    boxes, scores, labels = zip(*results, strict=True)
    zero = torch.zeros(4, dtype=torch.float64)
    return (
        pad(boxes, max_detections, zero),
        pad(scores, max_detections, zero[0]),
        pad(labels, max_detections, torch.tensor(0)),
        torch.tensor([len(score) for score in scores]),
    )


def check_detections(device, proposals=17, classes=6, *, batch=1, boxes=None, dtype=torch.float32, seed=0, **options):
    """A call agrees with the oracle, on inputs of these sizes, rounded to `dtype`."""
    inputs = draw_predictions(proposals, classes, batch, seed, boxes)
    inputs = inputs[0].to(dtype), inputs[1].to(dtype), *inputs[2:]
    check_inputs(device, inputs, **OPTIONS | options)


def check_inputs(device, inputs, **options):
    """A call agrees with the oracle."""
    expected = detections_oracle(*inputs, **options)
    actual = select_detections(*(x.to(device) for x in inputs), **options)
    assert_selected(actual, expected, extent=max(IMAGE))


def degenerate(boxes=4):
    """Inputs with NaN, infinite and huge logits, deltas and proposals, and boxes without area."""
    class_logits, deltas, proposals, counts, image_sizes = draw_predictions(19, 4, boxes=boxes, seed=5)
    class_logits[0, 1], class_logits[1, 2], class_logits[2, 3] = NAN, INF, -INF
    class_logits[3], class_logits[4, 1] = -INF, 1e38
    deltas[5, 0, 0], deltas[6, 0, 0], deltas[7, 0, 2], deltas[8, 0, 3] = NAN, INF, INF, -INF
    deltas[9, 0, 0], deltas[10, 0, 2] = 1e38, 100.0
    proposals[0, 11] = NAN
    proposals[0, 12] = torch.tensor([0, 0, INF, 9])
    proposals[0, 13] = torch.tensor([30.0, 30, 20, 20])
    proposals[0, 14] = torch.tensor([30.0, 30, 30, 30])
    proposals[0, 15] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    return class_logits, deltas, proposals, counts, image_sizes


def check_agnostic(device):
    """Deltas `[R, 4]`."""
    class_logits, deltas, *rest = draw_predictions(17, 6, boxes=1, seed=6)
    check_inputs(device, (class_logits, deltas[:, 0], *rest), **OPTIONS)


def check_uniform(device):
    """All classes of a proposal have the same score, so that all of its slots are taken."""
    class_logits, deltas, proposals, counts, image_sizes = draw_predictions(9, 19, seed=7)
    class_logits[:, 0], class_logits[:, 1:] = -30.0, 0.0
    inputs = class_logits, deltas, proposals, counts, image_sizes
    check_inputs(device, inputs, **OPTIONS | {"score_threshold": 0.052, "max_detections": 180})


def check_sorted(device):
    """More slots than are counted."""
    with patch.object(order, "MAX_RANKED_SLOTS", 0):
        check_detections(device, batch=2)


def check_several_programs(device):
    """Candidates of several programs are listed."""
    with patch.object(order, "LISTED_SLOTS", 32):
        check_detections(device, batch=2, proposals=15, max_detections=70)


# By name: asserts that a small call of one variant of the kernels agrees with an oracle.
VARIANTS = {
    "classes": check_detections,
    "two images": partial(check_detections, batch=2, seed=1),
    "background decoded": partial(check_detections, boxes=7, **TORCHVISION),
    "background decoded, last": partial(check_detections, boxes=7, background="last"),
    "class-agnostic": check_agnostic,
    "detectron2": partial(check_detections, **DETECTRON2),
    "detectron2, class-agnostic": partial(check_detections, boxes=1, **DETECTRON2),
    "sigmoid": partial(check_detections, score_activation="sigmoid", score_threshold=0.6),
    "sigmoid, last": partial(check_detections, score_activation="sigmoid", score_threshold=0.6, background="last"),
    "sorted": check_sorted,
    "several programs": check_several_programs,
    "one class": partial(check_detections, classes=1, proposals=30),
    "weights, sides above": partial(
        check_detections, weights=(1.0, 2.0, 3.0, 5.0), min_size=4.0, min_size_inclusive=False
    ),
    "float64": partial(check_detections, dtype=torch.float64),
    "float16": partial(check_detections, dtype=torch.float16),
    "bfloat16": partial(check_detections, dtype=torch.bfloat16),
    "threshold 0": partial(check_detections, proposals=9, score_threshold=0.0),
    "negative threshold": partial(check_detections, proposals=9, score_threshold=-1.0),
    "all slots": check_uniform,
    "output filled": partial(check_detections, max_detections=3),
    "large output": partial(check_detections, max_detections=300),
    "more classes than a tile": partial(check_detections, classes=1100, proposals=2, score_threshold=2e-3),
    "none takes part": partial(check_detections, score_threshold=0.999),
    "degenerate": lambda device: check_inputs(device, degenerate(), **OPTIONS),
    "degenerate, torchvision": lambda device: check_inputs(device, degenerate(5), **TORCHVISION),
    "degenerate, detectron2": lambda device: check_inputs(device, degenerate(), **DETECTRON2),
    "degenerate, class-agnostic": lambda device: check_inputs(device, degenerate(1), **DETECTRON2),
}
