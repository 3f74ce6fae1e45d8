"""Inputs of `select_proposals`, its result in float64 by loops over images and levels, and the kernels' variants."""

from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from fastmask import select_proposals
from fastmask.kernels.nms import bit_matrix
from fastmask.kernels.select_proposals import forward
from tests.oracles.decode import assert_selected, decode_oracle, is_valid, pad
from tests.oracles.nms import greedy_nms

NAN, INF = float("nan"), float("inf")
IMAGE = (60, 90)
OPTIONS: dict[str, Any] = {"pre_nms_top_k": 30, "post_nms_top_k": 25, "iou_threshold": 0.5, "min_size": 1.0}
SIGMOID: dict[str, Any] = OPTIONS | {"score_activation": "sigmoid", "score_threshold": 0.4}
DETECTRON2: dict[str, Any] = OPTIONS | {"min_size": 0.0, "min_size_inclusive": False, "drop_non_finite": True}


def draw_predictions(sizes, batch=1, seed=0, image=IMAGE):
    """Logits, deltas and anchors of levels of these numbers of anchors, and image sizes; some boxes lie outside."""
    g = torch.Generator().manual_seed(seed)
    limit = torch.tensor([image[1], image[0]])
    logits, deltas, anchors = [], [], []
    for level, size in enumerate(sizes):
        centre = torch.rand(size, 2, generator=g) * limit * 1.4 - limit * 0.2
        half = torch.exp(torch.randn(size, 2, generator=g) * 0.3) * 5.0 * 2**level
        anchors.append(torch.cat([centre - half, centre + half], 1))
        deltas.append(torch.randn(batch, size, 4, generator=g) * 0.3)
        logits.append(torch.randn(batch, size, generator=g) * 2)
    image_sizes = torch.tensor(image) - torch.arange(batch)[:, None] * torch.tensor([5, 7])
    return logits, deltas, anchors, image_sizes


def proposals_oracle(
    logits,
    deltas,
    anchors,
    image_sizes,
    *,
    pre_nms_top_k,
    post_nms_top_k,
    iou_threshold,
    min_size,
    min_size_inclusive=True,
    weights=(1.0, 1.0, 1.0, 1.0),
    score_activation="none",
    score_threshold=None,
    drop_non_finite=False,
):
    """Level by level, each with its own NMS, then sorted by score."""
    all_boxes, all_scores = [], []
    for b, size in enumerate(image_sizes):
        boxes, scores = [torch.zeros(0, 4, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
        for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
            value, index = logit[b].double().sort(descending=True, stable=True)
            value, index = value[:pre_nms_top_k], index[:pre_nms_top_k]
            box, clipped = decode_oracle(delta[b, index], anchor[index], size, weights)
            valid = is_valid(box, clipped, min_size, min_size_inclusive, drop_non_finite)
            if drop_non_finite:
                valid &= value.isfinite()
            score = value.sigmoid() if score_activation == "sigmoid" else value
            valid &= score > -INF
            if score_threshold is not None:
                valid &= score >= score_threshold
            clipped, score = clipped[valid], score[valid]
            kept = greedy_nms(clipped, score, iou_threshold)
            boxes.append(clipped[kept])
            scores.append(score[kept])
        score, order = torch.cat(scores).sort(descending=True, stable=True)
        all_boxes.append(torch.cat(boxes)[order])
        all_scores.append(score)
    counts = torch.tensor([min(len(score), post_nms_top_k) for score in all_scores], dtype=torch.int64)
    like = torch.zeros(4, dtype=torch.float64)
    return pad(all_boxes, post_nms_top_k, like), pad(all_scores, post_nms_top_k, like[0]), counts


def check_proposals(device, sizes=(70, 40, 12), *, batch=1, dtype=torch.float32, seed=0, block=None, **options):
    """A call agrees with the oracle, on inputs of these sizes, rounded to `dtype`."""
    options = OPTIONS | options
    logits, deltas, anchors, image_sizes = draw_predictions(sizes, batch, seed)
    logits, deltas = [x.to(dtype) for x in logits], [x.to(dtype) for x in deltas]
    check_inputs(device, (logits, deltas, anchors, image_sizes), block=block, **options)


def check_inputs(device, inputs, *, block=None, **options):
    """A call agrees with the oracle."""
    expected = proposals_oracle(*inputs, **options)
    moved = [[x.to(device) for x in tensors] for tensors in inputs[:3]]
    with patch.object(forward, "DECODE_BLOCK", block or forward.DECODE_BLOCK):
        actual = select_proposals(*moved, inputs[3].to(device), **options)
    assert_selected(actual, expected, extent=max(IMAGE))


def degenerate(seed=3):
    """Inputs with NaN, infinite and huge logits, deltas and anchors, and boxes without area."""
    logits, deltas, anchors, image_sizes = draw_predictions((40, 20), seed=seed)
    logits[0][0, :4] = torch.tensor([NAN, INF, -INF, 1e38])
    logits[0][0, 4:20] += 10  # among the candidates
    deltas[0][0, 4] = NAN
    deltas[0][0, 5] = torch.tensor([INF, 0, 0, 0])
    deltas[0][0, 6] = torch.tensor([0, 0, INF, INF])
    deltas[0][0, 7] = torch.tensor([0, 0, -INF, 0])
    deltas[0][0, 8] = torch.tensor([1e38, 0, 0, 0])
    deltas[0][0, 9, 2:] = 100.0
    anchors[0][10] = NAN
    anchors[0][11] = torch.tensor([0, 0, INF, 9])
    anchors[0][12] = torch.tensor([30.0, 30, 20, 20])
    anchors[0][13] = torch.tensor([30.0, 30, 30, 30])
    anchors[0][14] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    return logits, deltas, anchors, image_sizes


def tied():
    """Logits of a few values, and boxes that do not overlap, each of its own level's size."""
    corner = torch.arange(12.0)[:, None] * torch.tensor([7.0, 4.0])
    anchors = [torch.cat([corner, corner + 2 + level], 1) for level in range(3)]
    logits = [torch.arange(12.0, 0, -1)[None].div(3).floor() for _ in anchors]
    return logits, [torch.zeros(1, 12, 4) for _ in anchors], anchors, torch.tensor([IMAGE])


def check_ties(device):
    """Equal scores are ordered by level; the order inside a level is that of `torch.topk`."""
    logits, deltas, anchors, image_sizes = tied()
    moved = [[x.to(device) for x in tensors] for tensors in (logits, deltas, anchors)]
    options = OPTIONS | {"post_nms_top_k": 40}
    boxes, scores, counts = select_proposals(*moved, image_sizes.to(device), **options)
    assert counts.tolist() == [36]
    assert torch.equal(scores[0, :36].cpu(), torch.cat(logits, 1)[0].sort(descending=True).values)
    sides = (boxes[0, :36, 2] - boxes[0, :36, 0]).round().int().cpu()
    for value in scores[0, :36].unique().tolist():
        of_value = sides[scores[0, :36].cpu() == value]
        assert torch.equal(of_value, of_value.sort().values)


def check_chunks(device):
    """More candidates than NMS takes at once."""
    with patch.object(bit_matrix, "MAX_CHUNK_ROWS", 64):
        check_proposals(device, sizes=(200, 31), pre_nms_top_k=190, post_nms_top_k=100)


# By name: asserts that a small call of one variant of the kernels agrees with an oracle.
VARIANTS = {
    "three levels": check_proposals,
    "one level": partial(check_proposals, sizes=(90,)),
    "two images": partial(check_proposals, batch=2, seed=1),
    "five levels, one empty": partial(check_proposals, sizes=(50, 33, 0, 9, 1), seed=2),
    "sigmoid": partial(check_proposals, **SIGMOID),
    "detectron2": partial(check_proposals, **DETECTRON2),
    "weights": partial(check_proposals, weights=(10.0, 10.0, 5.0, 3.0)),
    "float64": partial(check_proposals, dtype=torch.float64),
    "float16": partial(check_proposals, dtype=torch.float16),
    "bfloat16": partial(check_proposals, dtype=torch.bfloat16),
    "output filled": partial(check_proposals, post_nms_top_k=7),
    "output longer": partial(check_proposals, sizes=(20, 5), post_nms_top_k=70),
    "several blocks": partial(check_proposals, sizes=(300, 31), pre_nms_top_k=290, post_nms_top_k=60, block=128),
    "several blocks, sigmoid": partial(
        check_proposals, sizes=(301, 31), block=128, **SIGMOID | {"pre_nms_top_k": 290, "post_nms_top_k": 60}
    ),
    "several chunks": check_chunks,
    "none takes part": partial(check_proposals, min_size=1000.0),
    "degenerate": lambda device: check_inputs(device, degenerate(), **OPTIONS),
    "degenerate, sigmoid": lambda device: check_inputs(device, degenerate(), **SIGMOID),
    "degenerate, detectron2": lambda device: check_inputs(device, degenerate(), **DETECTRON2),
    "ties": check_ties,
}
