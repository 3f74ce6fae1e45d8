"""Pasting masks of 28 x 28 into the image, in torchvision's and in detectron2's convention (He et al. 2017, §3.1).

Bytes: masks and boxes read, a byte written for each pixel of each mask. FLOPs: a multiply-add for each of the four
neighbours of each pixel inside a box.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

import fastmask
from benchmarks import model_paste_masks
from benchmarks.harness import operators
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.machine import peer
from benchmarks.harness.timing import Implementation
from benchmarks.harness.workloads import ADVERSARIAL, DTYPES, generator, objects
from benchmarks.reporting.results import FASTMASK
from fastmask.kernels._mask_sampling import CONVENTIONS
from fastmask.kernels.paste_masks import PasteSpec, paste_masks_reference
from tests.oracles.paste_masks import ORACLES, VARIANTS, assert_probabilities, draw_masks

SIDE = 28
IMAGE = (800, 1333)
LARGE = (4000, 6000)


def compare_with_torchvision(
    comparison: Comparison,
    name: str,
    boxes: Tensor,
    image: tuple[int, int] = IMAGE,
    *,
    dtype: str = "float32",
    compiled: bool = False,
    **options: Unpack[CaseOptions],
) -> None:
    """Compare in torchvision's convention: a mask padded by one pixel, enlarged to a box of whole pixels.

    Args:
        comparison: the fixture.
        name: of the case.
        boxes: `[N, 4]`.
        image: (height, width).
        dtype: the dtype of the masks.
        compiled: also compare with torch.compile of fastmask's reference.
        options: see `CaseOptions`.
    """
    masks = _masks(comparison, len(boxes), dtype)
    boxes = boxes.to(comparison.device)
    providers: dict[str, Implementation] = {
        FASTMASK: lambda: fastmask.paste_masks(masks, boxes, image, convention="torchvision"),
        "torchvision": lambda: paste_masks_in_image(masks[:, None], boxes, image)[:, 0] >= 0.5,
    }
    if compiled:
        providers["torch.compile"] = compiled_reference(masks, boxes, image)
    _compare(comparison, name, providers, masks=masks, boxes=boxes, image=image, **options)


def compare_aligned(comparison: Comparison, name: str, boxes: Tensor) -> None:
    """Compare in detectron2's convention: pixel centres sampled over the box, every mask over the whole image."""
    masks = _masks(comparison, len(boxes), "float32")
    boxes = boxes.to(comparison.device)

    def grid_sample() -> Tensor:
        return torch.cat([_sampled(*part, IMAGE) for part in zip(masks.split(10), boxes.split(10), strict=True)])

    providers: dict[str, Implementation] = {
        FASTMASK: lambda: fastmask.paste_masks(masks, boxes, IMAGE),
        "grid_sample": grid_sample,
    }
    if mask_ops := peer("detectron2.layers.mask_ops"):
        providers["detectron2"] = lambda: mask_ops.paste_masks_in_image(masks, boxes, IMAGE)
    _compare(comparison, name, providers, masks=masks, boxes=boxes, image=IMAGE)


def compiled_reference(masks: Tensor, boxes: Tensor, image: tuple[int, int]) -> Implementation:
    """torch.compile of fastmask's reference, in torchvision's convention."""
    reference = torch.compile(paste_masks_reference)
    return lambda: reference(masks, boxes, PasteSpec(*image, 0.5, "torchvision"))


def _masks(comparison: Comparison, count: int, dtype: str) -> Tensor:
    return torch.rand(count, SIDE, SIDE, generator=generator()).to(comparison.device, DTYPES[dtype])


def _sampled(masks: Tensor, boxes: Tensor, image: tuple[int, int]) -> Tensor:
    """`[N, H, W]` by `torch.nn.functional.grid_sample`."""
    axes = []
    for axis, length in ((1, image[0]), (0, image[1])):
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        axes.append(2 * (torch.arange(length, device=boxes.device) + 0.5 - low) / (high - low) - 1)
    y, x = axes
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5


def _compare(
    comparison: Comparison,
    name: str,
    providers: dict[str, Implementation],
    *,
    masks: Tensor,
    boxes: Tensor,
    image: tuple[int, int],
    **options: Unpack[CaseOptions],
) -> None:
    height, width = image
    inside = int((boxes[:, 2:] - boxes[:, :2]).prod(1).sum())
    # A probability next to 0.5 may be rounded to either side, more often in half precision.
    allowed = 1e-6 if masks.dtype == torch.float32 else 1e-3

    def same(pasted: Tensor, expected: Tensor) -> bool:
        return int((pasted != expected).sum()) <= max(2, allowed * pasted.numel())

    bytes = masks.nbytes + boxes.nbytes + len(masks) * height * width
    comparison.run(name, providers, same, bytes=bytes, flops=inside * 4 * 2, **options)


def _objects(count: int, image: tuple[int, int]) -> Tensor:
    """Boxes of objects that grow with the image."""
    scale = image[0] / IMAGE[0]
    return objects(count, image=IMAGE) * scale


@pytest.mark.parametrize("dtype", parameters(zip(DTYPES), quick=lambda dtype: dtype == "float32"))
def bench_torchvision(comparison, dtype):
    compare_with_torchvision(
        comparison,
        f"100 masks to 800 x 1333, torchvision's convention, {dtype}",
        objects(100, image=IMAGE),
        dtype=dtype,
        compiled=dtype == "float32" and not comparison.quick,
        target={"cpu": 6, "gpu": 50} if dtype == "float32" else None,
    )


@pytest.mark.quick
def bench_aligned(comparison):
    compare_aligned(comparison, "100 masks to 800 x 1333, detectron2's convention", objects(100, image=IMAGE))


def bench_large_image(comparison):
    count = 100 if comparison.on_gpu else 10  # torchvision's 100 masks take 19 GB, and more while they are stacked
    name = f"{count} masks to 4000 x 6000, torchvision's convention"
    compare_with_torchvision(comparison, name, _objects(count, LARGE), LARGE)


@pytest.mark.parametrize("boxes", ADVERSARIAL)
def bench_adversarial(comparison, boxes):
    name = f"100 masks to 800 x 1333, {boxes}"
    compare_with_torchvision(comparison, name, ADVERSARIAL[boxes](100), kind="adversarial")


@pytest.mark.parametrize("masks", parameters(zip([1, 10, 100, 400]), quick=lambda masks: masks <= 10))
def bench_masks(comparison, masks):
    boxes, name = objects(masks, image=IMAGE), f"{masks} mask{'s' * (masks > 1)} to 800 x 1333"
    compare_with_torchvision(comparison, name, boxes, kind="scaling", axis="masks", at=masks)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2, 4])
def bench_image_size(comparison, scale):
    height, width = image = (round(scale * IMAGE[0]), round(scale * IMAGE[1]))
    options: CaseOptions = {"kind": "scaling", "axis": "image, megapixels", "at": height * width / 1e6}
    compare_with_torchvision(comparison, f"20 masks to {height} x {width}", _objects(20, image), image, **options)


def _calls(device: str, seed: int) -> list[operators.Call]:
    """Masks and probabilities, by both conventions."""
    masks, boxes = (tensor.to(device) for tensor in draw_masks(2, 7, 20, 30, seed))
    arguments = {"masks": masks, "boxes": boxes, "image_size": (20, 30)}
    return [
        operators.Call(fastmask.paste_masks, arguments | {"threshold": threshold, "convention": convention})
        for convention in CONVENTIONS
        for threshold in (0.5, None)
    ]


def _compile_case(threshold: float | None, convention: str) -> operators.Call:
    tensors = {"masks": operators.meta(100, SIDE, SIDE), "boxes": operators.meta(100, 4)}
    options = {"image_size": IMAGE, "threshold": threshold, "convention": convention}
    return operators.Call(fastmask.paste_masks, tensors | options)


def _check_random(draw: operators.Draw, device: str) -> None:
    """Random probabilities are those of the convention's oracle."""
    convention = draw.choice(CONVENTIONS)
    n, m, height, width = draw.integer(0, 3), draw.integer(1, 30), draw.integer(1, 30), draw.integer(1, 50)
    masks, boxes = (tensor[:n] for tensor in draw_masks(max(n, 1), m, height, width, draw.integer(0, 10**6)))
    exact = ORACLES[convention](masks, boxes, height, width)
    arguments = masks.to(device), boxes.to(device), (height, width), None
    assert_probabilities(fastmask.paste_masks(*arguments, convention=convention), exact, m)


OPERATOR = operators.Operator(
    calls=_calls,
    compile_cases={
        "100 masks 28x28, aligned, bool": partial(_compile_case, 0.5, "aligned"),
        "100 masks 28x28, torchvision, bool": partial(_compile_case, 0.5, "torchvision"),
        "100 masks 28x28, aligned, probabilities": partial(_compile_case, None, "aligned"),
        "100 masks 28x28, torchvision, probabilities": partial(_compile_case, None, "torchvision"),
    },
    limits={
        "_paste_masks_kernel": {
            "cuda": operators.Limit(72, wide_stores=True, loop_slow_paths=0),
            "hip": operators.Limit(64),
        },
    },
    check_random=_check_random,
    models=model_paste_masks.MODELS,
    targets=model_paste_masks.TARGETS,
    variants=VARIANTS,
)
