"""Whole detectors: from decoded uint8 images on the host to boxes, scores and run-length encoded masks on the host.

The steps from torchvision's model to our fastest are providers of one case. In float32 a GPU's convolutions use TF32,
as is PyTorch's default; that the two agree to the last digits without it is checked first. "bf16" is autocast: weights
are folded and cast anew in each call, and in each replay of the graph. Bytes: weights and images, once; FLOPs: the
convolutions and matrix products of the padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import detectors, stages
from benchmarks.harness.comparison import Race
from benchmarks.harness.machine import Call
from benchmarks.reporting.results import OURS, TORCHVISION
from models import preprocess as pictures
from models.network.mask_rcnn import MaskRCNN

SIZE = (800, 1333)  # §3.1
PRESETS = ("R-50-FPN", "R-101-FPN", "X-101-FPN", "R-101-C4", "R-50-FPN-keypoint")
GPU_ONLY = ("torchvision autocast", f"{OURS} bf16", f"{OURS} bf16 graph")


def pytest_generate_tests(metafunc):
    """A batch is for a GPU: on a CPU it takes as long as its images one by one, which one case shows."""
    if "batch" not in metafunc.fixturenames:
        return
    cases = [(preset, batch) for preset in PRESETS for batch in (1, 8)]
    if metafunc.config.option.device == "cpu":
        cases = [*((preset, 1) for preset in PRESETS), ("R-50-FPN", 4)]
    metafunc.parametrize(("preset", "batch"), cases)


def bench_detector(race: Race, preset: str, batch: int) -> None:
    target = {"cpu": 1 / 0.75} if (preset, batch) == ("R-50-FPN", 1) else None
    images = [detectors.picture(*SIZE, seed) for seed in range(batch)]
    race_detectors(race, f"{preset}, batch {batch}", preset, images, target=target)


@pytest.mark.quick
def bench_small_image(race: Race) -> None:
    race_detectors(race, "R-50-FPN, an image of 320 x 320", "R-50-FPN", [detectors.picture(320, 320)])


def race_detectors(race: Race, name: str, preset: str, images: Sequence[Tensor], **options: object) -> None:
    size = images[0].shape[1:]
    missing = dict(detectors.NO_RLE)
    calls: dict[str, Call] = {}
    theirs, places = None, {}
    if preset in detectors.BACKBONES:
        theirs = detectors.torchvisions(preset, size)
        model = detectors.ours(theirs)
        calls["torchvision"] = partial(detectors.detect_torchvisions, theirs.to(race.device), images)
        calls["torchvision autocast"] = in_bfloat16(calls["torchvision"], race.device)
        places = dict.fromkeys(calls, stages.of_torchvisions(theirs))
    else:
        model = detectors.ours_alone(preset, size)
        missing |= dict.fromkeys(TORCHVISION, "has no C4 detector")
    work = work_of(model, images, race.main_dtype)
    calls[OURS] = partial(detectors.detect, model.to(race.device), images)
    calls[f"{OURS} bf16"] = in_bfloat16(calls[OURS], race.device)
    places |= dict.fromkeys((OURS, f"{OURS} bf16"), stages.of_ours(model))
    if race.on_gpu:
        calls[f"{OURS} bf16 graph"] = partial(detectors.detect, detectors.graphed(model), images)
        if theirs is not None:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                assert detectors.same(calls[OURS](), calls["torchvision"]()), f"{name}: not the same in float32"
    else:
        missing = dict.fromkeys(GPU_ONLY, "timed on a GPU only") | missing
        calls = {provider: call for provider, call in calls.items() if provider not in GPU_ONLY}
    race(
        name,
        calls,
        detectors.same,
        **work,
        rate=race.main_dtype,
        missing=missing,
        images=len(images),
        stages=stages.measures(calls, places, race.device),
        events=False,
        **options,
    )


def in_bfloat16(call: Call, device: str) -> Call:
    def inside() -> object:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return call()

    return inside


def work_of(model: MaskRCNN, images: Sequence[Tensor], dtype: str) -> dict[str, int]:
    """Bytes and FLOPs, the latter counted without computing anything."""
    padded, sizes = pictures.batch(images, model.config.input)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(padded, sizes)
    weights = sum(parameter.numel() for parameter in model.parameters())
    size = getattr(torch, dtype).itemsize
    return {"bytes": size * weights + sum(image.nbytes for image in images), "flops": counter.get_total_flops()}
