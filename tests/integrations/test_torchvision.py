"""torchvision's detectors give the same detections with fastmask's operators."""

import copy
import pickle

import pytest
import torch
from torchvision.models import detection

from fastmask.integrations import torchvision as integration
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


def targets(device):
    """Three objects in the first image, and none in the second one."""
    boxes = [[[10, 10, 80, 90.0], [30, 40, 60, 60], [60, 5, 90, 70]], []]
    results = []
    for rows, image in zip(boxes, images(device), strict=False):
        g, n = torch.Generator().manual_seed(2), len(rows)
        target = {
            "boxes": torch.tensor(rows).reshape(-1, 4),
            "labels": torch.ones(n, dtype=torch.int64),
            "masks": torch.randint(2, (n, *image.shape[1:]), generator=g, dtype=torch.uint8),
            "keypoints": torch.cat([torch.rand(n, 17, 2, generator=g) * 100, torch.ones(n, 17, 1)], 2),
        }
        results.append({name: value.to(device) for name, value in target.items()})
    return results


@pytest.mark.reference_only
@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_same_losses_and_gradients_for_the_same_samples(name, device):
    # Samplers of this size take every box
    everything = {"rpn_batch_size_per_image": 10**5, "box_batch_size_per_image": 10**5, "box_positive_fraction": 0.5}
    everything["rpn_post_nms_top_n_train"] = 64
    model = detectors.build(name, SIZE, proposals=64, detections=3, **everything).to(device).train()

    def run():
        model.zero_grad()
        losses = model(images(device), targets(device))
        sum(losses.values()).backward()
        return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, expected_gradients = run()
    accelerate(model)
    losses, gradients = run()
    assert losses.keys() == expected.keys()
    for key, loss in expected.items():
        assert loss > 0
        torch.testing.assert_close(losses[key], loss, rtol=1e-4, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        assert (gradients[key] - gradient).norm() <= 5e-3 * gradient.norm() + 1e-5, key


@pytest.mark.reference_only
def test_fixed_numbers_of_boxes_are_sampled(device):
    model = accelerate(build("maskrcnn_resnet50_fpn")).to(device).train()
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 12
    proposals = [
        torch.rand(50, 2, device=device).repeat(1, 2).mul(60) + torch.tensor([0, 0, 30, 30.0], device=device)
    ] * 2
    boxes, matches, labels, deltas = model.roi_heads.select_training_samples(proposals, targets(device))
    assert [len(rows) for rows in boxes] == [12, 12]
    assert [rows.shape for rows in deltas] == [(12, 4)] * 2
    assert labels[0].unique().tolist() == [0, 1]
    assert (labels[0] == 1).sum() == 3
    assert (matches[0] < 3).all()
    assert not labels[1].any()


@pytest.mark.reference_only
def test_parts_of_the_users_own_are_used(device):
    class Coder(detection._utils.BoxCoder):
        def decode_single(self, rel_codes, boxes):
            return super().decode_single(rel_codes * 0.5, boxes)

    class Sampler(detection._utils.BalancedPositiveNegativeSampler):
        pass

    model = build("maskrcnn_resnet50_fpn").to(device)
    for part in (model.rpn, model.roi_heads):
        part.box_coder = Coder(part.box_coder.weights)
        part.fg_bg_sampler = Sampler(12, 0.5)
    with torch.inference_mode():
        before = model(images(device))
        after = accelerate(model)(images(device))
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new["boxes"], old["boxes"], rtol=1e-4, atol=1e-4)
    model.train()
    torch.manual_seed(3)
    losses = model(images(device), targets(device))
    restore(model)
    torch.manual_seed(3)
    torch.testing.assert_close(losses, model(images(device), targets(device)), rtol=1e-4, atol=1e-5)


@pytest.mark.reference_only
@pytest.mark.parametrize("name", ["fastrcnn_loss", "maskrcnn_loss"])
def test_functions_replaced_in_torchvision_stay_replaced(name, device, monkeypatch):
    original = getattr(detection.roi_heads, name)

    def zero(*arguments):
        losses = original(*arguments)
        return losses * 0 if isinstance(losses, torch.Tensor) else tuple(loss * 0 for loss in losses)

    model = accelerate(build("maskrcnn_resnet50_fpn")).to(device).train()
    monkeypatch.setattr(detection.roi_heads, name, zero)
    losses = model(images(device), targets(device))
    assert losses["loss_mask" if name.startswith("mask") else "loss_classifier"] == 0


@pytest.mark.reference_only
def test_masks_of_another_dtype_give_the_same_loss(device):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 28, 28, generator=g).to(device)
    boxes = [torch.tensor([[4, 5, 60, 50.0], [1, 2, 9, 9], [0, 0, 64, 64]], device=device)]
    masks = torch.rand(2, 64, 64, generator=g).to(device)
    labels, matches = torch.tensor([1, 3], device=device), torch.tensor([0, 1, 1], device=device)
    for dtype in (torch.uint8, torch.bool, torch.float32):
        given = (masks > 0.5).to(dtype)
        expected = detection.roi_heads.maskrcnn_loss(logits, boxes, [given.float()], [labels], [matches])
        actual = integration._mask_loss(logits, boxes, [given], [labels], [matches])
        torch.testing.assert_close(actual, expected)


@pytest.mark.reference_only
@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_scores_are_differentiable_in_evaluation_mode(name, device):
    model = accelerate(build(name)).to(device)
    pixels = images(device)[0].requires_grad_()
    (detections,) = model([pixels])
    sum(value.sum() for key, value in detections.items() if "scores" in key).backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.reference_only
@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_images_without_detections_and_without_objects(name, device):
    model = build(name).to(device)
    model.roi_heads.score_thresh = 2.0
    with torch.inference_mode():
        before = model(images(device))
        after = accelerate(model)(images(device))
    for old, new in zip(before, after, strict=True):
        assert {key: value.shape for key, value in new.items()} == {key: value.shape for key, value in old.items()}
        assert {key: value.dtype for key, value in new.items()} == {key: value.dtype for key, value in old.items()}
    empty = targets(device)[1:] * 2
    empty[0] = {**empty[0], "masks": empty[0]["masks"].new_zeros(0, *images(device)[0].shape[1:])}
    losses = model.train()(images(device), empty)
    sum(losses.values()).backward()
    assert losses["loss_rpn_box_reg"] == losses["loss_box_reg"] == 0
    assert losses["loss_mask" if name.startswith("mask") else "loss_keypoint"] == 0


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
