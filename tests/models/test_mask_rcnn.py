"""The whole detector against torchvision's with the same weights; inference in fixed shapes; training."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask import Masks
from models import preprocess
from models.config import KeypointHeadConfig, ModelConfig
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS
from models.structures import Target, pad_targets
from models.weights import checkpoint
from models.weights.torchvision import convert_detector
from tests.oracles import detectors
from tests.oracles.mask_targets import bitmaps

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]

SIZE, PROPOSALS, DETECTIONS = 192, 304, 20


def pair(name, tmp_path, **options):
    """torchvision's detector, and fastmask's with its weights and its settings."""
    reference = detectors.build(name, SIZE, proposals=PROPOSALS, detections=DETECTIONS, **options)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    loaded, _ = checkpoint.load_model(tmp_path / "weights.pth", "cpu")
    config = loaded.config
    config = replace(
        config,
        input=replace(config.input, min_size=SIZE, max_size=2 * SIZE),
        rpn=replace(
            config.rpn,
            pre_nms_top_k=PROPOSALS,
            proposals=PROPOSALS // 8,
            pre_nms_top_k_train=PROPOSALS,
            proposals_train=PROPOSALS // 4,
            samples_per_image=10**6,
        ),
        sampling=replace(config.sampling, rois_per_image=10**6),
        box=replace(config.box, score_threshold=0.0, detections=DETECTIONS),
    )
    model = MaskRCNN(config)
    model.load_state_dict(loaded.state_dict())
    return reference, model.eval()


def pixels(*sizes):
    g = torch.Generator().manual_seed(2)
    return [torch.randint(0, 256, (3, *size), generator=g, dtype=torch.uint8) for size in sizes]


def target(height, width, count, keypoints=False):
    g = torch.Generator().manual_seed(3)
    low = torch.rand(count, 2, generator=g) * 80
    boxes = torch.cat([low, low + 20 + torch.rand(count, 2, generator=g) * 80], 1)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = 1
    points = None
    if keypoints:
        points = torch.cat([torch.rand(count, 17, 2, generator=g) * 150, torch.ones(count, 17, 1)], 2)
        points[:, 3, 2] = 0
        points[:, 4, :2] = boxes[:, 2:]  # on the far corner, which belongs to the last pixel
    labels = torch.ones(count, dtype=torch.int64) if keypoints else torch.arange(count) % 3 + 1
    return Target(boxes, labels, torch.zeros(0, 4), Masks.from_bitmaps(masks), points)


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_detections_are_torchvisions(name, tmp_path):
    reference, model = pair(name, tmp_path)
    images = pixels((192, 208), (250, 192))  # the second is padded, and P6 of an odd P5
    with torch.inference_mode():
        expected = reference([image / 255 for image in images])
        detections = model.detect(images)
    for old, new in zip(expected, detections, strict=True):
        assert len(new) == len(old["boxes"]) == DETECTIONS
        assert torch.equal(new.labels, old["labels"])
        torch.testing.assert_close(new.boxes, old["boxes"], rtol=0, atol=0.02)
        torch.testing.assert_close(new.scores, old["scores"], rtol=0, atol=1e-4)
        if "masks" in old:
            probabilities = old["masks"][:, 0]
            differs = new.masks() != (probabilities >= 0.5)
            assert differs.sum() <= 1e-4 * differs.numel()
            assert ((probabilities[differs] - 0.5).abs() < 1e-3).all()
        else:
            torch.testing.assert_close(new.keypoints, old["keypoints"], rtol=0, atol=0.02)
            torch.testing.assert_close(new.keypoint_scores, old["keypoints_scores"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_losses_and_gradients_are_torchvisions(name, tmp_path):
    reference, model = pair(
        name,
        tmp_path,
        rpn_pre_nms_top_n_train=PROPOSALS,
        rpn_post_nms_top_n_train=PROPOSALS // 4,
        rpn_batch_size_per_image=10**6,  # all of them: nothing is drawn
        box_batch_size_per_image=10**6,
    )
    keypoints = name.startswith("keypoint")
    images = pixels((192, 208), (224, 192))
    targets = [target(192, 208, 3, keypoints), target(224, 192, 1, keypoints)]
    old_targets = [
        {
            "boxes": t.boxes,
            "labels": t.labels,
            **({"keypoints": t.keypoints} if keypoints else {"masks": bitmaps(t.masks)}),
        }
        for t in targets
    ]
    reference.train().backbone.eval()
    model.train().backbone.eval()
    expected = reference([image / 255 for image in images], old_targets)
    losses = model(*preprocess.batch(images, model.config.input), pad_targets(targets))
    assert expected.keys() == losses.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-4, atol=1e-6)

    sum(expected.values()).backward()
    sum(losses.values()).backward()
    old = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
    old |= dict(reference.named_buffers())  # which the converter expects
    gradients = convert_detector(old).tensors
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) > 80
    trained = [(n, p) for n, p in trained if n != "keypoint_head.deconv.bias"]  # ignored by a softmax
    for name, parameter in trained:
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-12)
        # Where rounding moves a ReLU's input across zero, gradients change in all layers below it
        assert error < (0.1 if name.startswith("backbone") else 0.02), name


@pytest.mark.parametrize("preset", ["R-50-FPN", "R-50-C4", "R-50-FPN-mask-keypoint", "R-50-FPN-box"])
def test_inference_has_fixed_shapes(preset):
    """Fake tensors have no data, so that no shape can depend on it."""
    model = MaskRCNN(PRESETS[preset].model).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        detections = model(torch.empty(2, 3, 256, 320), torch.empty(2, 2, dtype=torch.int64))
    assert detections.boxes.shape == (2, 100, 4)
    assert detections.scores.shape == detections.labels.shape == (2, 100)
    assert detections.counts.shape == (2,)
    size = 14 if preset.endswith("C4") else 28
    assert detections.masks is None if preset.endswith("box") else detections.masks.shape == (2, 100, size, size)
    assert detections.keypoints is None or detections.keypoints.shape == (2, 100, 17, 3)
    assert detections.keypoint_scores is None or detections.keypoint_scores.shape == (2, 100, 17)


def small(**changes):
    config = PRESETS["demo"].model
    return replace(config, classes=3, **changes)


def test_the_padded_batch_and_the_list_agree():
    torch.manual_seed(0)
    config = small(keypoint=KeypointHeadConfig(convs=1, channels=32))
    config = replace(config, box=replace(config.box, score_threshold=0.0))
    model = MaskRCNN(config).eval()
    images = pixels((128, 160), (150, 128))  # not resized
    with torch.no_grad():
        padded = model(*preprocess.batch(images, config.input))
    for i, one in enumerate(model.detect(images)):
        count = int(padded.counts[i])
        assert len(one) == count > 0
        torch.testing.assert_close(one.boxes, padded.boxes[i, :count])
        torch.testing.assert_close(one.mask_probabilities, padded.masks[i, :count], rtol=1e-4, atol=1e-5)
        assert torch.equal(one.labels, padded.labels[i, :count])
        assert not padded.boxes[i, count:].any()
        assert not padded.labels[i, count:].any()
        assert one.keypoints.shape == (count, 17, 3)
        inside = one.keypoints[..., :2] - one.boxes[:, None, :2]
        assert ((inside >= 0) & (inside <= (one.boxes[:, None, 2:] - one.boxes[:, None, :2]).clamp(min=1))).all()


def test_detections_are_in_pixels_of_the_original_images():
    torch.manual_seed(0)
    config = small()
    model = MaskRCNN(replace(config, box=replace(config.box, score_threshold=0.0))).eval()
    (image,) = pixels((192, 256))
    large = torch.nn.functional.interpolate(image[None], scale_factor=2)[0]
    (one,), (two,) = model.detect([image]), model.detect([large])
    assert two.image_size == (384, 512)
    assert two.boxes[:, 2].max() > 256
    assert (two.boxes <= torch.tensor([512, 384, 512, 384])).all()
    assert two.masks().shape == (len(two), 384, 512)
    assert one.masks().shape == (len(one), 192, 256)


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (40, 40)])
def test_images_without_detections(size):
    torch.manual_seed(0)
    config = small(keypoint=KeypointHeadConfig(convs=1, channels=32))
    model = MaskRCNN(replace(config, box=replace(config.box, score_threshold=1.0))).eval()
    (detections,) = model.detect(pixels(size))
    assert len(detections) == 0
    assert detections.masks().shape == (0, *size)
    assert detections.keypoints.shape == (0, 17, 3)


def test_a_c4_learns():
    """Its res5 is applied to regions, after the pooling, and is trained there."""
    torch.manual_seed(0)
    config = PRESETS["R-50-C4"].model
    backbone = replace(config.backbone, depth=18, norm="batch", frozen_stages=0)
    model = MaskRCNN(replace(config, classes=3, backbone=backbone)).train()
    batch = preprocess.batch(pixels((96, 128), (96, 96)), config.input)
    targets = [target(96, 128, 2), target(96, 96, 1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    history = []
    for _ in range(8):
        loss = sum(model(*batch, pad_targets(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]
    assert model.roi_features.res5[0].conv1.weight.grad.any()


@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
def test_images_without_ground_truth_train(counts):
    torch.manual_seed(0)
    model = MaskRCNN(small(keypoint=KeypointHeadConfig(convs=1, channels=32))).train()
    images = pixels((192, 224), (192, 192))
    targets = [target(*image.shape[1:], count, True) for image, count in zip(images, counts, strict=True)]
    losses = model(*preprocess.batch(images, model.config.input), pad_targets(targets))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # DistributedDataParallel needs it
        assert parameter.grad.isfinite().all(), name


def test_frozen_stages_stay():
    config = ModelConfig(classes=3, backbone=replace(ModelConfig().backbone, depth=18, norm="batch"))
    model = MaskRCNN(config).train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    sum(feature.sum() for feature in model.backbone(torch.rand(2, 3, 64, 64))).backward()
    after = model.backbone.state_dict()
    for name, value in before.items():
        frozen = name.startswith(("conv1", "bn1", "layer1"))
        assert not name.endswith("running_mean") or torch.equal(value, after[name]) == frozen, name
    for name, parameter in model.backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(("conv1", "bn1", "layer1"))
        assert (parameter.grad is None) != parameter.requires_grad
