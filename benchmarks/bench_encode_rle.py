"""COCO's run-length encoding of 100 masks of 28 x 28 in an image of 800 x 1333 (He et al. 2017, §3.1).

The peer is the usual path: `paste_masks`, a copy in column-major order, pycocotools' `mask.encode`. The masks are
smooth blobs, the shape that a trained network predicts: about 320 runs each. Masks of noise have 2,600 and are an
adversarial case: COCO's servers would receive 3.8 kB for each.

Bytes: masks and boxes read, strings written. FLOPs: none that any implementation has to compute for each pixel.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import pytest
import torch
from torch import Tensor

import fastmask
from benchmarks import model_encode_rle
from benchmarks.harness import operators
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.workloads import ADVERSARIAL, generator, objects
from benchmarks.reporting.results import FASTMASK
from fastmask.kernels._mask_sampling import CONVENTIONS
from fastmask.kernels.encode_rle import RLE
from fastmask.kernels.encode_rle.forward import CAPACITY, launch_encode_bitmaps_padded
from tests.oracles.encode_rle import VARIANTS, coco_encode, paste_and_encode, smooth_masks
from tests.oracles.paste_masks import draw_masks

SIDE = 28
IMAGE = (800, 1333)
PEER = "paste + pycocotools"


def _same(rles: list[RLE], expected: list[RLE]) -> bool:
    return rles == expected


def compare(
    comparison: Comparison, name: str, masks: Tensor, boxes: Tensor, convention: str, **options: Unpack[CaseOptions]
) -> None:
    """Compare with pasting, and encoding what was pasted.

    Args:
        comparison: the fixture.
        name: of the case.
        masks: `[N, m, m]`.
        boxes: `[N, 4]`.
        convention: of `paste_masks`.
        options: see `CaseOptions`.
    """
    masks, boxes = masks.to(comparison.device), boxes.to(comparison.device)
    text = sum(len(rle["counts"]) for rle in fastmask.encode_rle(masks, boxes, IMAGE, convention=convention))
    comparison.run(
        name,
        {
            FASTMASK: lambda: fastmask.encode_rle(masks, boxes, IMAGE, convention=convention),
            PEER: lambda: paste_and_encode(masks, boxes, IMAGE, convention=convention),
        },
        _same,
        bytes=masks.nbytes + boxes.nbytes + text,
        capture=False,
        **options,
    )


def _noise(count: int) -> Tensor:
    return torch.rand(count, SIDE, SIDE, generator=generator())


@pytest.mark.quick
@pytest.mark.parametrize("convention", CONVENTIONS)
def bench_smooth(comparison, convention):
    compare(
        comparison,
        f"100 masks to 800 x 1333, {convention}",
        smooth_masks(100, SIDE),
        objects(100, image=IMAGE),
        convention,
        target={"cpu": 10} if convention == "aligned" else None,
    )


def bench_noise(comparison):
    name = "100 masks of noise to 800 x 1333"
    compare(comparison, name, _noise(100), objects(100, image=IMAGE), "aligned", kind="adversarial")


@pytest.mark.parametrize("boxes", ADVERSARIAL)
def bench_adversarial(comparison, boxes):
    name = f"100 masks to 800 x 1333, {boxes}"
    compare(comparison, name, smooth_masks(100, SIDE), ADVERSARIAL[boxes](100), "aligned", kind="adversarial")


@pytest.mark.parametrize("masks", parameters(zip([1, 10, 100, 400]), quick=lambda masks: masks <= 10))
def bench_masks(comparison, masks):
    name = f"{masks} mask{'s' * (masks > 1)} to 800 x 1333"
    boxes = objects(masks, image=IMAGE)
    compare(comparison, name, smooth_masks(masks, SIDE), boxes, "aligned", kind="scaling", axis="masks", at=masks)


def bench_bitmaps(comparison):
    boxes = objects(100, image=IMAGE)
    bitmaps = fastmask.paste_masks(smooth_masks(100, SIDE), boxes, IMAGE).to(comparison.device)
    providers = {
        FASTMASK: lambda: fastmask.encode_bitmaps(bitmaps),
        "pycocotools": lambda: coco_encode(bitmaps),
    }
    comparison.run("100 bitmaps of 800 x 1333", providers, _same, bytes=bitmaps.nbytes, capture=False)


def _calls(device: str, seed: int) -> list[operators.Call]:
    """Strings of both forms, by both conventions, and of bitmaps."""
    masks, boxes = (tensor.to(device) for tensor in draw_masks(2, 7, 20, 30, seed))
    arguments = {"masks": masks, "boxes": boxes, "image_size": (20, 30)}
    padded = {"masks": masks[None], "boxes": boxes[None], "image_size": (20, 30)}
    bitmaps = torch.rand(2, 20, 30, generator=generator(seed)).to(device) < 0.5
    counts = torch.tensor([1], device=device)
    return [
        *(
            operators.Call(fastmask.encode_rle, arguments | {"threshold": 0.4, "convention": name}, dynamic=True)
            for name in CONVENTIONS
        ),
        operators.Call(fastmask.encode_rle_padded, padded | {"threshold": 0.5, "capacity": 50}),
        operators.Call(fastmask.encode_rle_padded, padded | {"counts": counts, "convention": "torchvision"}),
        operators.Call(fastmask.encode_bitmaps, {"bitmaps": bitmaps}, dynamic=True),
    ]


def _compile_case(convention: str, dtype: torch.dtype = torch.float32) -> operators.Call:
    tensors = {"masks": operators.meta(1, 100, SIDE, SIDE, dtype=dtype), "boxes": operators.meta(1, 100, 4)}
    options = {"counts": operators.meta(1, dtype=torch.int64), "image_size": IMAGE, "convention": convention}
    return operators.Call(fastmask.encode_rle_padded, tensors | options)


def _compile_bitmaps() -> operators.Call:
    bitmaps = operators.meta(100, *IMAGE, dtype=torch.bool)
    return operators.Call(launch_encode_bitmaps_padded, {"bitmaps": bitmaps, "capacity": CAPACITY})


def _check_random(draw: operators.Draw, device: str) -> None:
    """Random masks have the strings that pycocotools gives for the pasted masks."""
    convention, smooth = draw.choice(CONVENTIONS), draw.choice([False, True])
    n, m, height, width = draw.integer(1, 3), draw.integer(1, 30), draw.integer(1, 70), draw.integer(1, 50)
    seed, threshold = draw.integer(0, 10**6), draw.choice([0.5, 0.3, 1.0, 0.0])
    masks, boxes = draw_masks(n, m, height, width, seed)
    masks = (smooth_masks(n, m, seed) if smooth else masks).to(device)
    boxes = (boxes.round() if draw.choice([False, True]) else boxes).to(device)
    expected = paste_and_encode(masks, boxes, (height, width), threshold, convention)
    assert fastmask.encode_rle(masks, boxes, (height, width), threshold, convention=convention) == expected


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        "RLE of 100 masks 28x28, aligned": partial(_compile_case, "aligned"),
        "RLE of 100 masks 28x28, torchvision": partial(_compile_case, "torchvision"),
        "RLE of 100 masks 28x28, aligned, float64": partial(_compile_case, "aligned", torch.float64),
        "RLE of 100 bitmaps": _compile_bitmaps,
    },
    limits={
        "pack_masks_kernel": {"cuda": operators.Limit(72, loop_slow_paths=0), "hip": operators.Limit(72)},
        "pack_bitmaps_kernel": {"cuda": operators.Limit(40, slow_paths=0), "hip": operators.Limit(72)},
        "store_ends_kernel": {"cuda": operators.Limit(40, slow_paths=0), "hip": operators.Limit(72)},
        "store_characters_kernel": {"cuda": operators.Limit(40, slow_paths=0), "hip": operators.Limit(72)},
        "join_strings_kernel": {"cuda": operators.Limit(80, slow_paths=0), "hip": operators.Limit(72)},
    },
    check_random=_check_random,
    models=model_encode_rle.MODELS,
    targets=model_encode_rle.TARGETS,
    variants=VARIANTS,
)
