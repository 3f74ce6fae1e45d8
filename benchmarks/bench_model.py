"""Whole detectors: from decoded uint8 images on the host to boxes, scores and run-length encoded masks on the host.

The providers of a case are the steps from torchvision's model to fastmask's fastest. In float32, convolutions on a GPU
use TF32, PyTorch's default; before anything is timed, both detectors have to agree without it. "bf16" is autocast:
weights are folded and cast in each call, and in each replay of the graph. Bytes: weights and images, once. FLOPs: the
convolutions and matrix products of the padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Unpack

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import stages
from benchmarks.harness.comparison import CaseOptions, Comparison, Target, Work
from benchmarks.harness.detectors import graphed
from benchmarks.harness.timing import Implementation
from benchmarks.reporting.results import FASTMASK, TORCHVISION
from models import preprocess
from models.network.mask_rcnn import MaskRCNN
from tests.oracles import detections, detectors

SIZE = (800, 1333)  # §3.1
PRESETS = ("R-50-FPN", "R-101-FPN", "X-101-FPN", "R-101-C4", "R-50-FPN-keypoint")
BF16, GRAPH = f"{FASTMASK} bf16", f"{FASTMASK} bf16 graph"
GPU_ONLY = ("torchvision autocast", BF16, GRAPH)
NO_RLE = "pycocotools is not installed, the masks' pixels are copied to the host instead"


def pytest_generate_tests(metafunc):
    """Batches are measured on a GPU. On a CPU a batch takes as long as its images one by one; one case shows it."""
    if "batch" not in metafunc.fixturenames:
        return
    cases = [(preset, batch) for preset in PRESETS for batch in (1, 8)]
    if metafunc.config.option.device == "cpu":
        cases = [*((preset, 1) for preset in PRESETS), ("R-50-FPN", 4)]
    metafunc.parametrize(("preset", "batch"), cases)


def bench_detector(comparison, preset, batch):
    target: Target = {"cpu": 1 / 0.75} if (preset, batch) == ("R-50-FPN", 1) else None
    images = [detectors.textured_image(*SIZE, seed) for seed in range(batch)]
    compare_detectors(comparison, f"{preset}, batch {batch}", preset, images, target=target)


@pytest.mark.quick
def bench_small_image(comparison):
    images = [detectors.textured_image(320, 320)]
    compare_detectors(comparison, "R-50-FPN, an image of 320 x 320", "R-50-FPN", images)


def compare_detectors(
    comparison: Comparison, name: str, preset: str, images: Sequence[Tensor], **options: Unpack[CaseOptions]
) -> None:
    """Compare inference on uint8 `[3, H, W]` images on the host."""
    size = images[0].shape[1:]
    missing = {} if detections.HAS_PYCOCOTOOLS else {"RLE": NO_RLE}
    calls: dict[str, Implementation] = {}
    places: dict[str, list[stages.Place]] = {}
    if preset in detectors.BACKBONES:
        peer = detectors.torchvision_detector(preset, size)
        model = detectors.fastmask_detector(peer)
        calls["torchvision"] = partial(detections.detect_torchvision, peer.to(comparison.device), images)
        calls["torchvision autocast"] = in_bfloat16(calls["torchvision"], comparison.device)
        places = dict.fromkeys(calls, stages.of_torchvision(peer))
    else:
        model = detectors.c4_detector(preset, size)
        missing |= dict.fromkeys(TORCHVISION, "has no C4 detector")
    work = work_of(model, images, comparison.main_dtype)
    calls[FASTMASK] = partial(detections.detect, model.to(comparison.device), images)
    calls[BF16] = in_bfloat16(calls[FASTMASK], comparison.device)
    places |= {FASTMASK: [], BF16: []}  # fastmask marks its stages itself; a replayed graph has no marks
    if comparison.on_gpu:
        calls[GRAPH] = partial(detections.detect, graphed(model), images, exact=False)
        if "torchvision" in calls:
            check_in_float32(name, calls)
    else:
        missing = dict.fromkeys(GPU_ONLY, "timed on a GPU only") | missing
        calls = {provider: call for provider, call in calls.items() if provider not in GPU_ONLY}
    comparison.run(
        name,
        calls,
        detections.same,
        **work,
        rate=comparison.main_dtype,
        missing=missing,
        stages=stages.measures(calls, comparison.device, places),
        events=False,
        images=len(images),
        **options,
    )


def check_in_float32(name: str, calls: dict[str, Implementation]) -> None:
    """Both detectors have to agree without TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        result: Sequence[detections.HostDetections] = calls[FASTMASK]()  # pyright: ignore[reportAssignmentType]
        expected: Sequence[detections.HostDetections] = calls["torchvision"]()  # pyright: ignore[reportAssignmentType]
    assert detections.same(result, expected), f"{name}: the detectors disagree in float32"


def in_bfloat16(call: Implementation, device: str) -> Implementation:
    """The call under autocast."""

    def run() -> object:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return call()

    return run


def work_of(model: MaskRCNN, images: Sequence[Tensor], dtype: str) -> Work:
    """Bytes and FLOPs; FLOPs are counted on fake tensors."""
    padded, sizes = preprocess.batch(images, model.config.input)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(padded, sizes)
    weights = sum(parameter.numel() for parameter in model.parameters())
    size = getattr(torch, dtype).itemsize
    return {"bytes": size * weights + sum(image.nbytes for image in images), "flops": counter.get_total_flops()}
