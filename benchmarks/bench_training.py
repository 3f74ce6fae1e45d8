"""A training step: forward to the losses, backward, and an update by SGD.

On a GPU both detectors run under autocast in bfloat16, and torchvision's in float32 as well. Batch norms, the stem and
res2 are frozen, as in published models; the small case trains everything. Each detector draws its own samples, so
losses agree to a tenth only. torchvision takes float images, and resizes images and masks within the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Unpack

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import stages
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.timing import Implementation
from benchmarks.harness.workloads import IMAGE, generator, objects
from benchmarks.reporting.results import FASTMASK
from fastmask import Masks
from models import preprocess
from models.structures import Target, pad_targets
from tests.oracles import detectors

LR = 1e-6  # random weights: thousands of steps on one batch must not change the losses
OBJECTS = 7  # COCO has 7.3 in an image


@pytest.mark.quick
def bench_small_images(comparison):
    """From scratch, with all batch norms trained."""
    count = 1 if comparison.quick else 4
    peer = detectors.torchvision_detector("R-18-FPN", (192, 192), frozen=False)
    name = f"R-18-FPN, {count} of 192 x 192"
    compare_steps(comparison, name, peer, training_images((192, 192), count), target={"cpu": 1 / 0.6})


@pytest.mark.parametrize("preset", ["R-50-FPN", "R-101-FPN"])
def bench_step(comparison, preset):
    size, count = (800, 1333), 2 if comparison.on_gpu else 1  # §3.1, on each GPU
    peer = detectors.torchvision_detector(preset, size)
    name = f"{preset}, {count} of 800 x 1333"
    goal = 1 / 0.65 if preset == "R-50-FPN" else 1 / 0.8
    compare_steps(comparison, name, peer, training_images(size, count), target={"cpu": goal})


def training_images(size: tuple[int, int], count: int) -> list[Tensor]:
    return [detectors.textured_image(*size, seed) for seed in range(count)]


def compare_steps(
    comparison: Comparison, name: str, peer: nn.Module, images: Sequence[Tensor], **options: Unpack[CaseOptions]
) -> None:
    """Compare training steps of one of torchvision's detectors and of fastmask's with its weights.

    Args:
        comparison: the fixture.
        name: the case's name.
        peer: torchvision's detector.
        images: uint8 `[3, H, W]`, all of one size.
        options: see `CaseOptions`.
    """
    model = detectors.fastmask_detector(peer).to(comparison.device).train()
    peer.to(comparison.device).train()
    images = [image.to(comparison.device) for image in images]
    floats = [image / 255 for image in images]
    size, classes = images[0].shape[1:], model.config.classes
    targets = [target(size, classes, seed).to(comparison.device) for seed in range(len(images))]
    padded = pad_targets(targets)
    dictionaries = [{"boxes": t.boxes, "labels": t.labels, "masks": bitmaps(t.boxes, size)} for t in targets]

    def fastmask_losses() -> dict[str, Tensor]:
        return model(*preprocess.batch(images, model.config.input), padded)

    def torchvision_losses() -> dict[str, Tensor]:
        return peer(floats, dictionaries)

    fastmask_step = partial(step, fastmask_losses, sgd(model), comparison.device, half=comparison.on_gpu)
    torchvision_step = partial(step, torchvision_losses, sgd(peer), comparison.device)
    calls: dict[str, Implementation] = {"torchvision": torchvision_step}
    if comparison.on_gpu:
        half = partial(torchvision_step, half=True)
        calls = {"torchvision autocast": half, "torchvision float32": torchvision_step}
    places = dict.fromkeys(calls, stages.of_torchvision(peer)) | {FASTMASK: []}
    calls[FASTMASK] = fastmask_step
    comparison.run(
        name,
        calls,
        lambda loss, expected: bool((loss - expected).abs() < 0.1 * expected),
        stages=stages.measures(calls, comparison.device, places),
        events=False,
        images=len(images),
        **options,
    )


def step(
    losses: Callable[[], dict[str, Tensor]], optimizer: torch.optim.Optimizer, device: str, *, half: bool = False
) -> Tensor:
    """One training step; `half`: the forward runs under autocast in bfloat16. Returns the sum of the losses."""
    with stages.mark(stages.OPTIMIZER):
        optimizer.zero_grad()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
        loss = reduce(add, losses().values())
    with stages.mark(stages.BACKWARD):
        loss.backward()
    with stages.mark(stages.OPTIMIZER):
        optimizer.step()
    return loss.detach()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, LR, momentum=0.9, weight_decay=1e-4)


def target(size: Sequence[int], classes: int, seed: int) -> Target:
    """Random ground truth with objects of COCO's sizes, for an image of `size`, (height, width)."""
    boxes = objects(OBJECTS, seed=seed) * torch.tensor([size[1] / IMAGE[1], size[0] / IMAGE[0]]).repeat(2)
    labels = torch.randint(1, classes + 1, (OBJECTS,), generator=generator(seed))
    return Target(boxes, labels, torch.zeros(0, 4), Masks.from_bitmaps(bitmaps(boxes, size)))


def bitmaps(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """`[G, H, W]` uint8, masks that fill their boxes `[G, 4]`."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8, device=boxes.device)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return masks
