"""torchvision's detectors give the same detections with fastmask's operators."""

import copy
import pickle

import pytest
import torch
from torchvision.models import detection

from fastmask.integrations.torchvision import accelerate, restore
from fastmask.kernels._runtime import INTERPRETED
from tests.oracles import detectors

pytestmark = pytest.mark.unpoisoned

# The interpreter takes about 40 ms for each program of a kernel: these sizes take about a minute.
SIZE, PROPOSALS, DETECTIONS = (96, 64, 3) if INTERPRETED else (192, 300, 20)


def build(name):
    return detectors.build(name, SIZE, proposals=PROPOSALS, detections=DETECTIONS)


def images(device):
    g = torch.Generator().manual_seed(1)
    sizes = [(SIZE, SIZE + 16), (SIZE + 8, SIZE)]
    return [torch.rand(3, *size, generator=g).to(device) for size in sizes[: 1 if INTERPRETED else 2]]


@pytest.mark.parametrize(
    "name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"]
)
def test_same_detections_before_and_after(name, device):
    if INTERPRETED and name.startswith("faster"):
        name = "maskrcnn_resnet50_fpn_v2"  # another one with masks: Faster R-CNN adds no other kernel
    model = build(name).to(device)
    state = model.state_dict()
    with torch.inference_mode():
        before = model(images(device))
        assert accelerate(model) is model
        after = model(images(device))
        assert restore(model) is model
        again = model(images(device))
    for old, new, last in zip(before, after, again, strict=True):
        assert len(old["boxes"]) == DETECTIONS
        assert old.keys() == new.keys()
        for key, value in old.items():
            torch.testing.assert_close(new[key], value, rtol=1e-4, atol=1e-4)
            assert torch.equal(last[key], value)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.reference_only
def test_an_accelerated_model_trains_copies_and_pickles(device):
    model = accelerate(build("maskrcnn_resnet50_fpn")).to(device).train()
    target = {
        "boxes": torch.tensor([[10, 10, 80, 90.0]], device=device),
        "labels": torch.tensor([1], device=device),
        "masks": torch.ones(1, SIZE, SIZE + 16, dtype=torch.uint8, device=device),
    }
    losses = model(images(device)[:1], [target])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.roi_heads.parameters())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]


@pytest.mark.reference_only
def test_other_models_and_custom_modules_are_left_alone():
    class CustomPooler(detection.mask_rcnn.MultiScaleRoIAlign):
        pass

    model, other = (build("fasterrcnn_mobilenet_v3_large_fpn") for _ in range(2))
    model.roi_heads.box_roi_pool = CustomPooler(["0", "1"], 7, 2)
    classes = [type(module) for module in other.modules()]
    accelerate(accelerate(model))
    assert type(model.roi_heads.box_roi_pool) is CustomPooler
    assert [type(module) for module in other.modules()] == classes
    restore(model)
    assert type(model.rpn) is detection.rpn.RegionProposalNetwork


@pytest.mark.reference_only
def test_boxes_receive_no_gradient():
    # As from torchvision's operator; a detector that is differentiated in evaluation mode pools masks from such boxes.
    model = accelerate(build("fasterrcnn_mobilenet_v3_large_fpn"))
    features = {name: torch.rand(1, 256, 8, 8, requires_grad=True) for name in ("0", "1", "pool")}
    boxes = [torch.tensor([[8.0, 8, 40, 40]], requires_grad=True)]
    model.roi_heads.box_roi_pool(features, boxes, [(64, 64)]).sum().backward()
    assert boxes[0].grad is None
    assert features["0"].grad is not None


@pytest.mark.reference_only
@pytest.mark.parametrize("call", [accelerate, restore])
def test_other_models_are_named(call):
    with pytest.raises(TypeError, match="model: expected a torchvision two-stage detector, got Linear"):
        call(torch.nn.Linear(1, 1))


@pytest.mark.reference_only
@pytest.mark.filterwarnings("ignore:RCNN always returns a")
def test_a_restored_model_can_be_scripted():
    untouched, restored = (build("fasterrcnn_mobilenet_v3_large_fpn") for _ in range(2))
    with torch.no_grad():
        accelerate(restored)(images("cpu"))
        restore(restored)
        (_, expected), (_, actual) = (torch.jit.script(model)(images("cpu")) for model in (untouched, restored))
    assert len(expected[0]["boxes"]) == DETECTIONS
    for detections, others in zip(actual, expected, strict=True):
        assert all(torch.equal(detections[key], value) for key, value in others.items())
