"""Decoding the keypoints of 100 persons, 17 heatmaps of 56 x 56 each, in an image of 800 x 1333 (He et al. 2017, §5).

Heatmaps are smooth peaks over a noisy background, as a trained head predicts them, at random places; noise alone is the
adversarial case, in which many places have almost the largest value. Bytes: heatmaps and boxes read, keypoints and
scores written. FLOPs: bounds of every cell, twenty for each heatmap pixel.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

import fastmask
from benchmarks import model_decode_keypoints
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.machine import peer
from benchmarks.harness.operators import Call, Draw, Limit, Operator, meta
from benchmarks.harness.timing import Implementation
from benchmarks.harness.workloads import DTYPES, objects
from benchmarks.reporting.results import FASTMASK
from fastmask.kernels.decode_keypoints.geometry import CONVENTIONS
from tests.oracles.decode_keypoints import VARIANTS, assert_keypoints, draw_boxes, draw_heatmaps

PERSONS, POINTS, SIDE = 100, 17, 56
IMAGE = (800, 1333)


def compare_with_torchvision(
    comparison: Comparison, name: str, persons: int = PERSONS, *, heatmaps: str = "peak", **options: Unpack[CaseOptions]
) -> None:
    """Compare with torchvision's loop over persons."""
    boxes = objects(persons, image=IMAGE).to(comparison.device)
    maps = draw_heatmaps(persons, POINTS, SIDE, kind=heatmaps).to(comparison.device)

    def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
        """Of values that are equal up to rounding, either may be chosen."""
        (keypoints, scores), (other, other_scores) = actual, expected
        differ = ((keypoints[..., :2] - other[..., :2]).abs() > 1e-2).any(-1).float().mean()
        return bool(differ < 0.01) and torch.allclose(scores, other_scores, rtol=0, atol=1e-4)

    providers: dict[str, Implementation] = {
        FASTMASK: lambda: fastmask.decode_keypoints(maps, boxes),
        "torchvision": lambda: heatmaps_to_keypoints(maps, boxes),
    }
    if detectron2 := peer("detectron2.structures.keypoints"):

        def detectron2_keypoints() -> tuple[Tensor, Tensor]:
            decoded = detectron2.heatmaps_to_keypoints(maps, boxes)
            return decoded[..., :3], decoded[..., 2]

        providers["detectron2"] = detectron2_keypoints
    moved = maps.nbytes + boxes.nbytes + persons * POINTS * 4 * 4
    comparison.run(name, providers, same, bytes=moved, flops=20 * maps.numel(), **options)


@pytest.mark.quick
def bench_persons(comparison):
    name = f"{PERSONS} persons, 17 keypoints, 56 x 56"
    compare_with_torchvision(comparison, name, target={"cpu": 5})


def bench_noise(comparison):
    compare_with_torchvision(comparison, f"{PERSONS} persons, noise", heatmaps="noise", kind="adversarial")


@pytest.mark.parametrize("persons", [1, 10, 400])
def bench_number(comparison, persons):
    options: CaseOptions = {"kind": "scaling", "axis": "persons", "at": persons}
    compare_with_torchvision(comparison, f"{persons} person{'s' * (persons > 1)}", persons, **options)


def _calls(device: str, seed: int) -> list[Call]:
    tensors = {"heatmaps": draw_heatmaps(2, 2, 6, seed).to(device), "boxes": draw_boxes(2, 2, 12, seed).to(device)}
    return [Call(fastmask.decode_keypoints, tensors | {"convention": convention}) for convention in CONVENTIONS]


def _compile_case(dtype: str, convention: str) -> Call:
    tensors = {"heatmaps": meta(PERSONS, POINTS, SIDE, SIDE, dtype=DTYPES[dtype]), "boxes": meta(PERSONS, 4)}
    return Call(fastmask.decode_keypoints, tensors | {"convention": convention})


def _check_random(draw: Draw, device: str) -> None:
    n, points, m = draw.integer(1, 2), draw.integer(1, 2), draw.integer(1, 9)
    seed, kind = draw.integer(0, 10**6), draw.choice(["noise", "peak"])
    heatmaps, boxes = draw_heatmaps(n, points, m, seed, kind), draw_boxes(n, 0.2, 30, seed)
    assert_keypoints(device, heatmaps, boxes, draw.choice(CONVENTIONS))


OPERATOR = Operator(
    calls=_calls,
    compile_cases={
        f"100 persons 17x56x56, {convention}, {dtype}": partial(_compile_case, dtype, convention)
        for convention in CONVENTIONS
        for dtype in ("float32", "bfloat16")
    },
    limits={"_decode_keypoints_kernel": {"cuda": Limit(80, loop_slow_paths=0), "hip": Limit(72)}},
    check_random=_check_random,
    variants=VARIANTS,
    models=model_decode_keypoints.MODELS,
    targets=model_decode_keypoints.TARGETS,
)
