"""Proposals of an 800 x 1344 image: 268,569 anchors of five levels, 1000 candidates of each, 1000 proposals.

Bytes: all logits; deltas and anchors of the candidates; proposals, with their scores. FLOPs: those of decoding the
candidates. The comparisons of NMS have a section of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork

import fastmask
from benchmarks import model_select_proposals
from benchmarks.harness import operators
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.workloads import IMAGE, generator
from benchmarks.reporting.results import FASTMASK
from tests.oracles.decode import assert_selected
from tests.oracles.select_proposals import (
    DETECTRON2,
    OPTIONS,
    SIGMOID,
    VARIANTS,
    draw_predictions,
    proposals_oracle,
)

STRIDES = (4, 8, 16, 32, 64)  # P2 to P6
RATIOS = (0.5, 1.0, 2.0)
PAPER: dict[str, Any] = {"pre_nms_top_k": 1000, "post_nms_top_k": 1000, "iou_threshold": 0.7, "min_size": 1e-3}
TRAINING: dict[str, Any] = PAPER | {"pre_nms_top_k": 2000, "post_nms_top_k": 2000}
DECODE_FLOPS = 24  # 2 exponentials counted as one each, 16 for two axes, 6 comparisons

Predictions = tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]


def _level_shapes() -> list[tuple[int, int]]:
    return [(-(-IMAGE[0] // stride), -(-IMAGE[1] // stride)) for stride in STRIDES]


def _predictions(images: int, device: str) -> Predictions:
    """Logits with the mean and spread of a trained RPN's, small deltas, and anchors of 8 strides' side."""
    logits, deltas, anchors = [], [], []
    g = generator()
    for stride, (height, width) in zip(STRIDES, _level_shapes(), strict=True):
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        ratio = torch.tensor(RATIOS).sqrt()
        half = torch.stack([1 / ratio, ratio], 1) * (4.0 * stride)
        centre = torch.stack([x, y], -1)[:, :, None].float()
        anchors.append(torch.cat([centre - half, centre + half], -1).flatten(0, 2))
        size = len(anchors[-1])
        logits.append(torch.randn(images, size, generator=g) * 2 - 4)
        deltas.append(torch.randn(images, size, 4, generator=g) * 0.2)
    image_sizes = torch.tensor([[800, 1333]]).expand(images, 2).contiguous()
    logits, deltas, anchors = ([tensor.to(device) for tensor in tensors] for tensors in (logits, deltas, anchors))
    return logits, deltas, anchors, image_sizes.to(device)


@pytest.mark.parametrize(
    ("images", "training"), parameters([(1, False), (2, True)], quick=lambda images, _: images == 1)
)
def bench_proposals(comparison: Comparison, images: int, training: bool) -> None:
    options = (TRAINING if training else PAPER) | {"score_activation": "sigmoid", "score_threshold": 0.0}
    logits, deltas, anchors, image_sizes = _predictions(images, comparison.device)
    top = {"training": 0, "testing": options["pre_nms_top_k"]}
    post = {"training": 0, "testing": options["post_nms_top_k"]}
    rpn = RegionProposalNetwork(AnchorGenerator(), nn.Identity(), 0.7, 0.3, 256, 0.5, top, post, 0.7).eval()
    sizes = [tuple(size) for size in image_sizes.tolist()]
    per_level = [logit.shape[1] for logit in logits]
    all_deltas, all_anchors, all_logits = torch.cat(deltas, 1).flatten(0, 1), torch.cat(anchors), torch.cat(logits, 1)

    def fastmask_proposals() -> tuple[Tensor, Tensor, Tensor]:
        return fastmask.select_proposals(logits, deltas, anchors, image_sizes, **options)

    def torchvision_proposals() -> tuple[list[Tensor], list[Tensor]]:
        decoded = rpn.box_coder.decode(all_deltas, [all_anchors] * images).view(images, -1, 4)
        return rpn.filter_proposals(decoded, all_logits, sizes, per_level)

    def same(result: tuple[Tensor, Tensor, Tensor], expected: tuple[list[Tensor], list[Tensor]]) -> bool:
        """torchvision's NMS rounds IoUs by an offset for few boxes, and a GPU's `exp` rounds differently."""
        boxes, _, counts = result
        shares = []
        for box, count, others in zip(boxes, counts.tolist(), expected[0], strict=True):
            near = torch.cdist(box[:count], others, p=float("inf")).amin(1) < 1e-2
            shares.append(abs(count - len(others)) <= 0.01 * count and near.float().mean() > 0.98)
        return all(shares)

    candidates = sum(images * min(options["pre_nms_top_k"], size) for size in per_level)
    proposals = images * options["post_nms_top_k"]
    comparison.run(
        f"{images} x {options['post_nms_top_k']} proposals of {sum(per_level):,} anchors",
        {FASTMASK: fastmask_proposals, "torchvision": torchvision_proposals},
        same,
        bytes=all_logits.nbytes + candidates * 32 + proposals * 20,
        flops=candidates * DECODE_FLOPS,
    )


def _calls(device: str, seed: int) -> list[operators.Call]:
    """Each of the three ways, on two images and three levels."""
    *lists, image_sizes = draw_predictions((40, 12, 3), 2, seed)
    logits, deltas, anchors = ([tensor.to(device) for tensor in tensors] for tensors in lists)
    inputs = {"logits": logits, "deltas": deltas, "anchors": anchors, "image_sizes": image_sizes.to(device)}
    return [operators.Call(fastmask.select_proposals, inputs | options) for options in (OPTIONS, SIGMOID, DETECTRON2)]


def _compile_case(images: int = 1, dtype: torch.dtype = torch.float32, **options: object) -> operators.Call:
    sizes = [height * width * len(RATIOS) for height, width in _level_shapes()]
    inputs = {
        "logits": [operators.meta(images, size, dtype=dtype) for size in sizes],
        "deltas": [operators.meta(images, size, 4, dtype=dtype) for size in sizes],
        "anchors": [operators.meta(size, 4) for size in sizes],
        "image_sizes": operators.meta(images, 2, dtype=torch.int64),
    }
    return operators.Call(fastmask.select_proposals, inputs | PAPER | options)


def _check_random(draw: operators.Draw, device: str) -> None:
    """A random call agrees with the oracle, unless an IoU is so close to the threshold that rounding decides."""
    sizes = [draw.integer(0, 60) for _ in range(draw.integer(1, 4))]
    options: dict[str, Any] = draw.choice([OPTIONS, SIGMOID, DETECTRON2]) | {
        "pre_nms_top_k": draw.integer(0, 50),
        "post_nms_top_k": draw.integer(0, 60),
        "iou_threshold": draw.choice([0.0, 0.3, 0.7, 1.0]),
    }
    inputs = draw_predictions(sizes, draw.integer(1, 2), draw.integer(0, 10**6))
    expected = proposals_oracle(*inputs, **options)
    for nudge in (-1e-5, 1e-5):
        nearby = proposals_oracle(*inputs, **options | {"iou_threshold": options["iou_threshold"] + nudge})
        if not torch.equal(nearby[0], expected[0]):
            return
    logits, deltas, anchors = ([tensor.to(device) for tensor in tensors] for tensors in inputs[:3])
    actual = fastmask.select_proposals(logits, deltas, anchors, inputs[3].to(device), **options)
    assert_selected(actual, expected, 100)


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        "proposals of R-50-FPN": _compile_case,
        "proposals of R-50-FPN, sigmoid": partial(_compile_case, score_activation="sigmoid", score_threshold=0.0),
        "proposals of R-50-FPN, bfloat16, training": partial(_compile_case, 2, torch.bfloat16, **TRAINING),
        "proposals of R-50-FPN, detectron2": partial(
            _compile_case, min_size=0.0, min_size_inclusive=False, drop_non_finite=True
        ),
    },
    limits={
        "decode_candidates_kernel": {"cuda": operators.Limit(72, slow_paths=0), "hip": operators.Limit(64)},
        "merge_levels_kernel": {"cuda": operators.Limit(40, slow_paths=0), "hip": operators.Limit(40)},
    },
    check_random=_check_random,
    models=model_select_proposals.MODELS,
    targets=model_select_proposals.TARGETS,
    variants=VARIANTS,
)
