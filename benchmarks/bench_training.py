"""A training step: forward to the losses, backward, and an update by SGD.

On a GPU both run under autocast in bfloat16, and torchvision's in float32 as well. As published models are trained,
batch norms, the stem and res2 are frozen; in the small case everything is trained. Each draws its own samples, so that
losses agree to a tenth. torchvision gets floats, and makes sure of the size of images and masks within the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import detectors, stages
from benchmarks.harness.comparison import Race
from benchmarks.harness.workloads import IMAGE, generator, objects
from benchmarks.reporting.results import OURS
from models import preprocess as pictures
from models.structures import Target

LR = 1e-6  # of random weights: thousands of steps on one batch must not get anywhere
OBJECTS = 7  # COCO has 7.3 in an image


@pytest.mark.quick
def bench_small_images(race: Race) -> None:
    """From scratch, all batch norms trained."""
    number = 1 if race.quick else 4
    theirs = detectors.torchvisions("R-18-FPN", (192, 192), frozen=False)
    race_steps(race, f"R-18-FPN, {number} of 192 x 192", theirs, (192, 192), number, target={"cpu": 1 / 0.8})


@pytest.mark.parametrize("preset", ["R-50-FPN", "R-101-FPN"])
def bench_step(race: Race, preset: str) -> None:
    size, number = (800, 1333), 2 if race.on_gpu else 1  # §3.1, on each GPU
    theirs = detectors.torchvisions(preset, size)
    race_steps(race, f"{preset}, {number} of 800 x 1333", theirs, size, number)


def race_steps(race: Race, name: str, theirs: nn.Module, size: tuple[int, int], number: int, **options: object) -> None:
    model = detectors.ours(theirs).to(race.device).train()
    theirs.to(race.device).train()
    images = [detectors.picture(*size, seed).to(race.device) for seed in range(number)]
    floats = [image / 255 for image in images]
    targets = [target(size, model.config.classes, seed).to(race.device) for seed in range(number)]
    dictionaries = [{"boxes": t.boxes, "labels": t.labels, "masks": t.masks} for t in targets]

    def our_losses() -> dict[str, Tensor]:
        return model(*pictures.batch(images, model.config.input), targets)

    def their_losses() -> dict[str, Tensor]:
        return theirs(floats, dictionaries)

    our_optimizer, their_optimizer = sgd(model), sgd(theirs)
    our_step = partial(step, our_losses, our_optimizer, race.device)
    their_step = partial(step, their_losses, their_optimizer, race.device)
    their_places = stages.of_torchvisions(theirs) + stages.of_training(their_optimizer)
    if race.on_gpu:
        their_steps = {"torchvision autocast": partial(their_step, half=True), "torchvision float32": their_step}
    else:
        their_steps = {"torchvision": their_step}
    calls = their_steps | {OURS: partial(our_step, half=race.on_gpu)}
    places = dict.fromkeys(their_steps, their_places)
    places[OURS] = stages.of_ours(model) + stages.of_training(our_optimizer)
    race(
        name,
        calls,
        lambda a, b: bool((a - b).abs() < 0.1 * b),
        images=number,
        stages=stages.measures(calls, places, race.device),
        events=False,
        **options,
    )


def step(
    losses: Callable[[], dict[str, Tensor]], optimizer: torch.optim.Optimizer, device: str, *, half: bool = False
) -> Tensor:
    optimizer.zero_grad()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
        loss = sum(losses().values())
    loss.backward()
    optimizer.step()
    return loss.detach()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, LR, momentum=0.9, weight_decay=1e-4)


def target(size: Sequence[int], classes: int, seed: int) -> Target:
    """COCO's objects, in an image of (height, width)."""
    boxes = objects(OBJECTS, seed=seed) * torch.tensor([size[1] / IMAGE[1], size[0] / IMAGE[0]]).repeat(2)
    masks = torch.zeros(OBJECTS, *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.randint(1, classes + 1, (OBJECTS,), generator=generator(seed))
    return Target(boxes, labels, torch.zeros(0, 4), masks)
