"""Sampling of the boxes that losses are computed on: of the anchors of an image, and of its proposals.

Bytes: labels read, indices written.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

import fastmask
from benchmarks import model_sample_matches
from benchmarks.harness import operators
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import Comparison
from benchmarks.reporting.results import FASTMASK
from tests.oracles.sample_matches import VARIANTS, check_sampled, draw_labels

ANCHORS, POSITIVES, NEGATIVES = 268_569, 150, 266_000  # of an image with few objects
PROPOSALS = 2100


def compare(
    comparison: Comparison, name: str, images: int, boxes: int, number: int, fraction: float, **options
) -> None:
    """Compare with torchvision's sampler, which returns masks of any number of samples."""
    share = boxes / ANCHORS
    positives, negatives = [POSITIVES] * images, [int(NEGATIVES * share)] * images
    labels = draw_labels((images, boxes), positives, negatives, 0).to(comparison.device)
    sampler = BalancedPositiveNegativeSampler(number, fraction)
    peers_labels = list(labels.float())

    def same(
        result: tuple[torch.Tensor, torch.Tensor], expected: tuple[list[torch.Tensor], list[torch.Tensor]]
    ) -> bool:
        """As many positives and negatives."""
        indices, valid = result
        drawn = labels.gather(1, indices)
        counts = [[int(((drawn[image] == kind) & valid[image]).sum()) for image in range(images)] for kind in (1, 0)]
        return counts == [[int(mask.sum()) for mask in masks] for masks in expected]

    providers = {
        FASTMASK: lambda: fastmask.sample_matches(labels, number, fraction),
        "torchvision": lambda: sampler(peers_labels),
    }
    comparison.run(name, providers, same, bytes=labels.nbytes + images * number * 9, flops=0, **options)


@pytest.mark.parametrize("images", parameters(zip([1, 2]), quick=lambda images: images == 1))
def bench_anchors(comparison, images):
    compare(comparison, f"256 of {ANCHORS:,} anchors, {images} image{'s' * (images > 1)}", images, ANCHORS, 256, 0.5)


def bench_proposals(comparison):
    compare(comparison, f"512 of {PROPOSALS:,} proposals, 2 images", 2, PROPOSALS, 512, 0.25)


def _calls(device: str, seed: int) -> list[operators.Call]:
    """At most one box of each kind, so that results are the same for all random numbers."""
    labels = draw_labels((2, 700), (1, 1), (1, 0), seed).to(device)
    return [
        operators.Call(fastmask.sample_matches, {"labels": labels, "number": number, "positive_fraction": 0.5})
        for number in (0, 16)
    ]


def _compile_case(images: int, boxes: int, number: int, fraction: float) -> operators.Call:
    labels = operators.meta(images, boxes, dtype=torch.int8)
    return operators.Call(fastmask.sample_matches, {"labels": labels, "number": number, "positive_fraction": fraction})


def _check_random(draw: operators.Draw, device: str) -> None:
    """Random labels are sampled as by a shuffle of lists."""
    boxes = draw.integer(1, 120)
    positives = draw.integer(0, boxes)
    negatives = draw.integer(0, boxes - positives)
    number, fraction = draw.integer(0, 60), draw.number(0, 1)
    check_sampled(device, (1, boxes), (positives,), (negatives,), number, fraction, seed=draw.integer(0, 1000))


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        "256 of 2 x 268,569 anchors": partial(_compile_case, 2, ANCHORS, 256, 0.5),
        "512 of 2 x 2,100 proposals": partial(_compile_case, 2, PROPOSALS, 512, 0.25),
    },
    limits={
        "count_labels_kernel": {"cuda": operators.Limit(32, slow_paths=0), "hip": operators.Limit(24)},
        "draw_samples_kernel": {"cuda": operators.Limit(72, slow_paths=0), "hip": operators.Limit(40)},
    },
    check_random=_check_random,
    models=model_sample_matches.MODELS,
    targets=model_sample_matches.TARGETS,
    variants=VARIANTS,
)
