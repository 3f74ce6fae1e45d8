"""Where a detector's time goes, by stage, in ours as in torchvision's.

The time between two marks belongs to the innermost stage that is running, so stages exclude one another and sum to the
whole. Marks are the clock on a CPU, and events on a GPU, which do not wait: a stage there includes the gaps in which
the device waits for the host. A stage runs while one of its functions does, each wrapped where it is looked up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from unittest.mock import patch

import torch
import torchvision
from torch import nn
from torchvision.models.detection import transform
from torchvision.transforms.v2 import functional

from benchmarks.harness import detectors
from models import preprocess as images
from models import structures
from models.network import heads, mask_rcnn, rpn
from models.network.mask_rcnn import MaskRCNN

STAGES = PREPROCESS, BACKBONE, FPN, RPN, POOLING, HEADS, NMS, PASTE, RLE, BACKWARD, OPTIMIZER, OTHER = (
    "preprocess",
    "backbone",
    "FPN",
    "RPN",
    "pooling",
    "heads",
    "NMS",
    "paste",
    "RLE",
    "backward",
    "optimizer",
    "other",
)

Place = tuple[object, str, str]  # an object, its attribute that is called, and the stage that runs meanwhile


class Stopwatch:
    """Tells stages apart in what runs inside `stage`; the outermost one is the whole."""

    def __init__(self, device: str) -> None:
        self._on_gpu = torch.device(device).type != "cpu"
        self._running = [OTHER]
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []  # which stage goes on from there

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._running.append(name)
        self._mark()
        try:
            yield
        finally:
            self._running.pop()
            self._mark()

    def milliseconds(self) -> dict[str, float]:
        """Of each stage that has run, in the order of `STAGES`; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        spent = dict.fromkeys(STAGES, 0.0)
        for (stage, start), (_, end) in pairwise(self._marks):
            spent[stage] += start.elapsed_time(end) if self._on_gpu else 1e3 * (end - start)
        ran = {stage for stage, _ in self._marks}
        return {stage: total for stage, total in spent.items() if stage in ran}

    def _mark(self) -> None:
        now = time.perf_counter()
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((self._running[-1], now))


def measure(call: Callable[[], object], places: Sequence[Place], device: str) -> dict[str, float]:
    """Milliseconds of each stage, as medians over a few calls on a GPU, of one on a CPU."""
    runs = [_measure(call, places, device) for _ in range(1 if device == "cpu" else 3)]
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}


def measures(
    calls: Mapping[str, Callable[[], object]], places: Mapping[str, Sequence[Place]], device: str
) -> dict[str, Callable[[], dict[str, float]]]:
    """What measures the stages of each provider, where its places are known."""
    return {name: partial(measure, call, places[name], device) for name, call in calls.items() if name in places}


def _measure(call: Callable[[], object], places: Sequence[Place], device: str) -> dict[str, float]:
    watch = Stopwatch(device)
    with ExitStack() as wrapped:
        for owner, name, stage in places:
            wrapped.enter_context(patch.object(owner, name, watch.stage(stage)(getattr(owner, name))))
        with watch.stage(OTHER):
            call()
    return watch.milliseconds()


def of_ours(model: MaskRCNN) -> list[Place]:
    return [
        (images, "resize", PREPROCESS),
        (images, "batch", PREPROCESS),
        (model.backbone, "forward", BACKBONE),
        *([] if model.fpn is None else [(model.fpn, "forward", FPN)]),
        *((model.rpn, name, RPN) for name in ("forward", "anchors", "propose", "losses")),
        (mask_rcnn, "multiscale_roi_align", POOLING),
        (model, "_infer", HEADS),  # and in these two, what is not in the others
        (model, "_head_losses", HEADS),
        (mask_rcnn, "decode_keypoints", HEADS),
        (rpn, "nms_padded", NMS),
        (heads, "nms_padded", NMS),
        (structures, "paste_masks", PASTE),
        (detectors, "encode_ours", RLE),
    ]


def of_torchvisions(model: nn.Module) -> list[Place]:
    roi_heads = model.roi_heads
    poolers = [roi_heads.box_roi_pool, roi_heads.mask_roi_pool, roi_heads.keypoint_roi_pool]
    return [
        (functional, "to_dtype", PREPROCESS),
        (model.transform, "forward", PREPROCESS),
        (model.backbone.body, "forward", BACKBONE),
        (model.backbone.fpn, "forward", FPN),
        (model.rpn, "forward", RPN),
        *((pooler, "forward", POOLING) for pooler in poolers if pooler is not None),
        (roi_heads, "forward", HEADS),
        (torchvision.ops.boxes, "batched_nms", NMS),
        (transform, "paste_masks_in_image", PASTE),
        (detectors, "threshold", PASTE),
        (detectors, "encode_torchvisions", RLE),
    ]


def of_training(optimizer: torch.optim.Optimizer) -> list[Place]:
    """What a training step adds to a model's."""
    return [
        (torch.autograd, "backward", BACKWARD),
        (optimizer, "step", OPTIMIZER),
        (optimizer, "zero_grad", OPTIMIZER),
    ]
