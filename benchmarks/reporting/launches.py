"""Launches, bytes and synchronisations of a detector by stage, counted without a GPU.

    python -m benchmarks launches

runs the real model on fake CUDA tensors under bfloat16 autocast; `launch_counter.py` says what is counted. Autograd's
engine needs a driver for CUDA tensors. The backward pass of a training step is therefore counted on fake CPU tensors,
for which the launchers run in the same way, and the rest of the step on fake CUDA tensors with gradients of zeros.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.harness.stages import BACKWARD
from benchmarks.reporting.launch_counter import LaunchCounter, counting
from fastmask import Masks, encode_rle_padded
from models.data.loader import Batch
from models.learner import Learner
from models.network.mask_rcnn import MaskRCNN
from models.network.matching import Samples
from models.presets import PRESETS
from models.stage_times import STAGES
from models.stages import end_to_end
from models.structures import PaddedDetections, Target, pad_targets

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "benchmarks" / "results" / "launches.md"
COMMAND = "python -m benchmarks launches"
PRESET = "R-50-FPN"
IMAGE = (800, 1333)
MAX_TEXT = 200_000  # bytes of run-length encoded masks that one copy holds
IMAGES, OBJECTS = 2, 7  # of a training step: §3.1, and COCO's objects per image


def count_inference(preset: str) -> LaunchCounter:
    """From one uint8 image of 800 x 1333 on the device to run-length encoded masks on the host."""
    model = MaskRCNN(PRESETS[preset].model).eval()
    with counting("cuda") as counter:
        _replace_tensors(model, "cuda")
        image = torch.empty(3, *IMAGE, dtype=torch.uint8, device="cuda")
        counter.reset()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            detections = model.detect_padded([image])
            _to_host(detections)
    return counter


def _to_host(detections: PaddedDetections) -> None:
    """Encode the masks, and copy all results in one piece."""
    assert detections.masks is not None
    text, lengths = encode_rle_padded(detections.masks, detections.boxes, IMAGE, counts=detections.counts)
    fixed = (detections.boxes, detections.scores, detections.labels, detections.counts, lengths)
    torch.cat([text[:MAX_TEXT], *(tensor.flatten().view(torch.uint8) for tensor in fixed)]).cpu()


def count_training(preset: str) -> LaunchCounter:
    """A step of `models.learner.Learner` on two images of 800 x 1333 with seven objects each."""
    model = MaskRCNN(PRESETS[preset].model).train()
    with counting("cuda") as counter:
        learner, batch = _learner(model, preset, "cuda")
        counter.reset()

        def backward(_loss: Tensor) -> None:
            with counter.paused():
                for parameter in learner.parameters:
                    parameter.grad = torch.zeros_like(parameter)

        with mock.patch.object(Tensor, "backward", backward):
            learner.step(iter([batch]), 0.01, 0)
    every_slot = mock.patch.object(Samples, "compact", lambda samples: samples)  # as on CUDA
    with every_slot, counting("cpu") as on_cpu, torch.autocast("cpu", torch.bfloat16):
        learner, batch = _learner(model, preset, "cpu")
        on_cpu.reset()
        learner.step(iter([batch]), 0.01, 0)
    counter.stages[BACKWARD] = on_cpu.stages[BACKWARD]
    return counter


def _replace_tensors(model: nn.Module, device: str) -> None:
    """Replace parameters and buffers by fake tensors of the same shapes, strides and dtypes on a device."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    setattr(module, name, fake)


def _learner(model: MaskRCNN, preset: str, device: str) -> tuple[Learner, Batch]:
    config = PRESETS[preset]
    _replace_tensors(model, device)
    learnable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    learner = Learner(model, end_to_end(config.solver)[0], learnable, config)
    images = [torch.empty(3, *IMAGE, dtype=torch.uint8, device="cpu") for _ in range(IMAGES)]
    return learner, Batch(images, pad_targets([_target() for _ in images]), [])


def _target() -> Target:
    """Ground truth with polygons; fake, as everything in `counting`."""
    polygon = [[10.0, 10.0, 50.0, 10.0, 50.0, 60.0]]
    masks = Masks.from_coco([polygon] * OBJECTS, IMAGE)
    return Target(torch.zeros(OBJECTS, 4), torch.ones(OBJECTS, dtype=torch.int64), torch.zeros(0, 4), masks)


def table(counter: LaunchCounter) -> str:
    """Launches, megabytes and synchronisations of each stage."""
    lines = ["| stage | launches | MB | synchronisations |", "|---|--:|--:|--:|"]
    order = {stage: index for index, stage in enumerate(STAGES)}
    for name in sorted(counter.stages, key=lambda name: order.get(name, len(order))):
        stage = counter.stages[name]
        lines.append(f"| {name} | {stage.launches} | {stage.bytes / 1e6:.0f} | {stage.synchronisations.total()} |")
    lines.append(f"| **total** | {counter.launches} | {counter.bytes / 1e6:.0f} | {counter.synchronisations.total()} |")
    places = [f"- {place}: {count}" for place, count in sorted(counter.synchronisations.items())]
    return "\n".join([*lines, "", *(["Synchronisations:", "", *places] if places else ["No synchronisation."]), ""])


def document() -> str:
    """The committed document."""
    inference, training = count_inference(PRESET), count_training(PRESET)
    return f"""# Launches and synchronisations

Written by `{COMMAND}` on fake CUDA tensors, without a GPU, and held by
`tests/models/test_launches.py`. {PRESET} under bfloat16 autocast; `benchmarks/reporting/launch_counter.py` says how
launches, bytes and synchronisations are counted.

## Inference

From one uint8 image of {IMAGE[0]} x {IMAGE[1]} on the device to boxes, scores, labels and run-length encoded masks
on the host.

{table(inference)}
## A training step

{IMAGES} images of {IMAGE[0]} x {IMAGE[1]} with {OBJECTS} objects each, from the loader's batch to updated weights.

{table(training)}"""


def main() -> int:
    """Rewrite the document."""
    DOCUMENT.write_text(document())
    print(DOCUMENT)
    return 0
