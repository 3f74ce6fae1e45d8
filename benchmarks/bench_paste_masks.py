"""Pasting masks of 28 x 28 into the image, as torchvision and as detectron2 do (He et al. 2017, §3.1).

Bytes: masks and boxes read, a byte written for each pixel of each mask. FLOPs: a multiply-add for each of the four
neighbours of each pixel inside a box.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

import fastmask
from benchmarks.harness import operators
from benchmarks.harness.comparison import Race, parameters
from benchmarks.harness.machine import Call, peer
from benchmarks.harness.pooling import DTYPES
from benchmarks.harness.workloads import ADVERSARIAL, generator, objects
from benchmarks.reporting.results import OURS
from fastmask.kernels.paste_masks import CONVENTIONS, PasteSpec, paste_masks_reference
from tests.oracles.paste_masks import ORACLES, assert_probabilities, draw_masks

SIDE = 28
IMAGE = (800, 1333)
LARGE = (4000, 6000)


def race_torchvision(
    race: Race,
    name: str,
    boxes: Tensor,
    image: tuple[int, int] = IMAGE,
    *,
    dtype: str = "float32",
    compiled: bool = False,
    **options: object,
) -> None:
    """Its convention: pixels of a mask that is padded by one and enlarged, over a box of whole pixels."""
    masks = _masks(race, len(boxes), dtype)
    boxes = boxes.to(race.device)
    providers: dict[str, Call] = {
        OURS: lambda: fastmask.paste_masks(masks, boxes, image, convention="torchvision"),
        "torchvision": lambda: paste_masks_in_image(masks[:, None], boxes, image)[:, 0] >= 0.5,
    }
    if compiled:
        reference = torch.compile(paste_masks_reference)
        providers["torch.compile"] = lambda: reference(masks, boxes, PasteSpec(*image, 0.5, "torchvision"))
    _race(race, name, providers, masks, boxes, image, **options)


def race_aligned(race: Race, name: str, boxes: Tensor) -> None:
    """detectron2's convention: pixel centres sampled over the box itself, every mask over the whole image."""
    masks = _masks(race, len(boxes), "float32")
    boxes = boxes.to(race.device)

    def grid_sample() -> Tensor:
        return torch.cat([_sampled(*part, IMAGE) for part in zip(masks.split(10), boxes.split(10), strict=True)])

    providers: dict[str, Call] = {
        OURS: lambda: fastmask.paste_masks(masks, boxes, IMAGE),
        "grid_sample": grid_sample,
    }
    if mask_ops := peer("detectron2.layers.mask_ops"):
        providers["detectron2"] = lambda: mask_ops.paste_masks_in_image(masks, boxes, IMAGE)
    _race(race, name, providers, masks, boxes, IMAGE)


def _masks(race: Race, count: int, dtype: str) -> Tensor:
    return torch.rand(count, SIDE, SIDE, generator=generator()).to(race.device, DTYPES[dtype])


def _sampled(masks: Tensor, boxes: Tensor, image: tuple[int, int]) -> Tensor:
    """`[N, H, W]` by `torch.nn.functional.grid_sample`."""
    axes = []
    for axis, length in ((1, image[0]), (0, image[1])):
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        axes.append(2 * (torch.arange(length, device=boxes.device) + 0.5 - low) / (high - low) - 1)
    y, x = axes
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5


def _race(
    race: Race,
    name: str,
    providers: dict[str, Call],
    masks: Tensor,
    boxes: Tensor,
    image: tuple[int, int],
    **options: object,
) -> None:
    height, width = image
    inside = int((boxes[:, 2:] - boxes[:, :2]).prod(1).sum())
    # A probability next to 0.5 may round either way, in half precision more often.
    allowed = 1e-6 if masks.dtype == torch.float32 else 1e-3

    def same(ours: Tensor, theirs: Tensor) -> bool:
        return int((ours != theirs).sum()) <= max(2, allowed * ours.numel())

    bytes = masks.nbytes + boxes.nbytes + len(masks) * height * width
    race(name, providers, same, bytes=bytes, flops=inside * 4 * 2, **options)


def _objects(count: int, image: tuple[int, int]) -> Tensor:
    """Boxes of objects that grow with the image."""
    scale = image[0] / IMAGE[0]
    return objects(count, image=IMAGE) * scale


@pytest.mark.parametrize("dtype", parameters(zip(DTYPES), quick=lambda dtype: dtype == "float32"))
def bench_torchvision(race, dtype):
    target = {"cpu": 6, "gpu": 50} if dtype == "float32" else None
    name = f"100 masks to 800 x 1333, torchvision's convention, {dtype}"
    compiled = dtype == "float32" and not race.quick
    race_torchvision(race, name, objects(100, image=IMAGE), dtype=dtype, target=target, compiled=compiled)


@pytest.mark.quick
def bench_aligned(race):
    race_aligned(race, "100 masks to 800 x 1333, detectron2's convention", objects(100, image=IMAGE))


def bench_large_image(race):
    count = 100 if race.on_gpu else 10  # torchvision's take 19 GB at 100, and more while they are stacked
    race_torchvision(race, f"{count} masks to 4000 x 6000, torchvision's convention", _objects(count, LARGE), LARGE)


@pytest.mark.parametrize("boxes", ADVERSARIAL)
def bench_adversarial(race, boxes):
    race_torchvision(race, f"100 masks to 800 x 1333, {boxes}", ADVERSARIAL[boxes](100), kind="adversarial")


@pytest.mark.parametrize("masks", parameters(zip([1, 10, 100, 400]), quick=lambda masks: masks <= 10))
def bench_masks(race, masks):
    boxes, name = objects(masks, image=IMAGE), f"{masks} mask{'s' * (masks > 1)} to 800 x 1333"
    race_torchvision(race, name, boxes, kind="scaling", axis="masks", at=masks)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2, 4])
def bench_image_size(race, scale):
    height, width = image = (round(scale * IMAGE[0]), round(scale * IMAGE[1]))
    options = {"kind": "scaling", "axis": "image, megapixels", "at": height * width / 1e6}
    race_torchvision(race, f"20 masks to {height} x {width}", _objects(20, image), image, **options)


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
        "_paste_masks_kernel": {"cuda": operators.Limit(80, wide_stores=True), "hip": operators.Limit(56)},
    },
    check_random=_check_random,
)
