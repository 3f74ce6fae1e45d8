"""Marks of stages in profiles, and where the detector has them."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastmask import Masks
from models import preprocess
from models.config import KeypointHeadConfig
from models.marks import STAGES, mark
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS
from models.structures import Target, pad_targets

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]

MARKS = {f"fastmask::{stage}": stage for stage in STAGES}


class Spans:
    """The events of a profile, of which some are marks."""

    def __init__(self, profile):
        self.events = profile.events()

    def stages(self):
        return {MARKS[event.name] for event in self.events if event.name in MARKS}

    def innermost(self, operator):
        """The innermost stages around the calls of an operator; None outside of all."""
        stages = set()
        for event in self.events:
            if event.name == operator:
                parent = event.cpu_parent
                while parent is not None and parent.name not in MARKS:
                    parent = parent.cpu_parent
                stages.add(MARKS[parent.name] if parent else None)
        return stages


def record(call):
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as events:
        call()
    return Spans(events)


def small(**changes):
    return replace(PRESETS["demo"].model, classes=3, **changes)


def pixels(height, width):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def test_inference_marks_its_stages():
    torch.manual_seed(0)
    config = small(keypoint=KeypointHeadConfig(convs=1, channels=32))
    config = replace(config, box=replace(config.box, score_threshold=0.0))
    model = MaskRCNN(config).eval()
    spans = record(lambda: [one.masks() for one in model.detect([pixels(120, 160)])])
    assert spans.stages() == {"preprocess", "backbone", "FPN", "RPN", "pooling", "heads", "selection", "paste"}
    assert spans.innermost("fastmask::roi_align") == {"pooling"}
    assert spans.innermost("fastmask::select_proposals") == {"selection"}
    assert spans.innermost("fastmask::paste_masks") == {"paste"}
    assert spans.innermost("aten::max_pool2d") == {"backbone", "FPN"}
    assert spans.innermost("aten::conv_transpose2d") == {"heads"}
    assert spans.innermost("aten::linear") == {"heads"}
    assert spans.innermost("fastmask::decode_keypoints") == {"heads"}
    assert spans.innermost("aten::sigmoid") == {"heads"}
    assert None not in spans.innermost("aten::topk")


def test_training_marks_its_stages():
    torch.manual_seed(0)
    model = MaskRCNN(small()).train()
    batch = preprocess.batch([pixels(96, 128)], model.config.input)
    boxes, masks = torch.tensor([[10.0, 20.0, 60.0, 80.0]]), torch.ones(1, 96, 128, dtype=torch.uint8)
    targets = [Target(boxes, torch.tensor([2]), torch.zeros(0, 4), Masks.from_bitmaps(masks))]
    spans = record(lambda: model(*batch, pad_targets(targets)))
    assert spans.stages() == {"backbone", "FPN", "RPN", "pooling", "heads", "selection"}
    assert spans.innermost("aten::binary_cross_entropy_with_logits") == {"RPN", "heads"}
    assert spans.innermost("aten::cross_entropy_loss") == {"heads"}
    assert spans.innermost("aten::rand") == {"RPN", "heads"}  # the sampling of anchors, and of proposals


def test_a_c4_marks_its_res5_as_heads():
    config = PRESETS["R-50-C4"].model
    model = MaskRCNN(replace(config, classes=3, backbone=replace(config.backbone, depth=18))).eval()
    with torch.no_grad():
        spans = record(lambda: model(*preprocess.batch([pixels(96, 96)], config.input)))
    assert spans.stages() == {"preprocess", "backbone", "RPN", "pooling", "heads", "selection"}
    assert spans.innermost("aten::conv2d") == {"backbone", "RPN", "heads"}


def test_a_mark_is_a_context_manager_and_a_decorator():
    @mark("selection")
    def suppress(depth):
        with mark("pooling"):
            torch.ones(1).exp()
        return suppress(depth - 1) if depth else torch.ones(1).log()

    spans = record(lambda: suppress(2))
    assert spans.innermost("aten::exp") == {"pooling"}
    assert spans.innermost("aten::log") == {"selection"}
    assert sum(event.name == "fastmask::selection" for event in spans.events) == 3
