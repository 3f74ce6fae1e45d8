"""Checkpoints: complete at any moment, no code in them executed, every difference from a model named."""

import os
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from models.config import (
    C4,
    FPN,
    AverageBox,
    BackboneConfig,
    FCBox,
    FCNMask,
    InputConfig,
    KeypointHeadConfig,
    ModelConfig,
)
from models.network.mask_rcnn import MaskRCNN
from models.weights import checkpoint
from models.weights.categories import COCO, COCO_PERSON
from models.weights.checkpoint import FORMAT, load_model, load_weights, save

pytestmark = pytest.mark.reference_only

SMALL = ModelConfig(
    classes=2,
    backbone=BackboneConfig(depth=18),
    features=FPN(channels=8),
    box=FCBox(conv_channels=8, fc_channels=8),
    mask=FCNMask(convs=1, channels=8),
    keypoint=KeypointHeadConfig(convs=1, channels=8),
)


def build(config):
    """A model whose tensors all differ, statistics of batch norms included."""
    torch.manual_seed(0)
    model = MaskRCNN(config)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def small():
    return build(SMALL)


@pytest.fixture(scope="module")
def small_file(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    save(path, small, COCO_PERSON * 2)
    return path


def assert_same(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip(suffix, small, tmp_path):
    path = tmp_path / f"model{suffix}"
    categories = (replace(COCO_PERSON[0], id=7), replace(COCO[0], name="Fahrräder"))
    save(path, small, categories)
    loaded, got = load_model(path, "cpu")
    assert got == categories
    assert loaded.config == SMALL
    assert not loaded.training
    assert_same(loaded.state_dict(), small.state_dict())
    assert os.listdir(tmp_path) == [path.name]


def test_training_state_beside_the_model(small, tmp_path):
    optimizer = torch.optim.SGD(small.parameters(), lr=0.5)
    save(tmp_path / "last.pth", small, COCO_PERSON, optimizer=optimizer.state_dict(), iteration=7)
    content = torch.load(tmp_path / "last.pth", weights_only=True)
    assert content["iteration"] == 7
    assert content["optimizer"]["param_groups"][0]["lr"] == 0.5
    with pytest.raises(ValueError, match=r"path: expected \.pth, or \.safetensors without a training state"):
        save(tmp_path / "last.safetensors", small, COCO_PERSON, iteration=7)
    assert os.listdir(tmp_path) == ["last.pth"]


def test_a_failing_write_keeps_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    path.write_bytes(b"old")

    def full_disk(_file):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(path, small, COCO_PERSON)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pth"]


def test_differences_are_listed(small_file, tmp_path):
    content = torch.load(small_file, weights_only=True)
    state = content["model"]
    del state["rpn.deltas.bias"]
    state["head.weight"] = torch.zeros(1)
    state["box_head.fcs.1.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: expected the weights of") as error:
        load_model(tmp_path / "other.pth")
    assert str(error.value).splitlines()[1:] == [
        "missing from the file: rpn.deltas.bias",
        "unexpected in the file: head.weight",
        "of another shape: box_head.fcs.1.bias: [8] in the model, [3] in the file",
    ]


def test_a_config_of_another_version_is_refused(small_file, tmp_path):
    content = torch.load(small_file, weights_only=True)
    content["config"]["colour"] = "red"
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"got \['colour'\]"):
        load_model(tmp_path / "other.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("number", "got"),
    [(None, "an older one without a number"), (FORMAT - 1, str(FORMAT - 1)), (FORMAT + 1, str(FORMAT + 1))],
)
def test_a_checkpoint_of_another_format_is_refused(number, got, suffix, small, tmp_path, monkeypatch):
    path = tmp_path / f"model{suffix}"
    monkeypatch.setattr(checkpoint, "FORMAT", number)
    save(path, small, COCO_PERSON)
    monkeypatch.undo()
    if number is None and suffix == ".pth":  # the file of the first layout, which had no number
        content = torch.load(path, weights_only=True)
        del content["format"]
        torch.save(content, path)
    message = rf"model\{suffix}: expected a checkpoint of format {FORMAT}, got {got};"
    for load in (load_model, partial(load_weights, small)):
        with pytest.raises(ValueError, match=message):
            load(path)


def test_torchvision_file(tmp_path):
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    box_head, predictor = TwoMLPHead(256 * 49, 8), FastRCNNPredictor(8, 4)
    detector = detection.FasterRCNN(backbone, box_head=box_head, box_predictor=predictor)
    path = tmp_path / "model_3.pth"
    torch.save({"model": detector.state_dict(), "epoch": 3}, path)  # as torchvision's training script does
    model, categories = load_model(path, "cpu")
    assert [category.name for category in categories] == ["1", "2", "3"]
    assert (model.backbone.bn1.eps, load_model(path, "cpu", norm_eps=1e-5)[0].backbone.bn1.eps) == (0.0, 1e-5)
    last_conv = detector.state_dict()["backbone.body.layer4.1.conv2.weight"]
    assert torch.equal(model.state_dict()["backbone.layer4.1.conv2.weight"], last_conv)
    assert torch.equal(model.box_head.deltas.weight, predictor.bbox_pred.weight[4:])

    # to start another detector from: its predictors and its mask branch stay as they are
    other = build(replace(SMALL, features=FPN(), keypoint=None))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    left = load_weights(other, path)
    kept = [*left.missing, *left.shapes]
    assert {name.rpartition(".")[0] for name in left.shapes} == {"box_head.class_logits", "box_head.deltas"}
    assert left.shapes["box_head.deltas.bias"] == ([8], [12])
    assert {name.split(".")[0] for name in left.missing} == {"mask_head"}
    assert left.settings["rpn.anchors.rounded"] == (False, True)
    assert left.settings["backbone.norm_eps"] == (1e-5, 0.0)
    assert "trained with another: pooling.aligned: True in the model, False in the file" in str(left)
    for name, tensor in other.state_dict().items():
        source = before if name in kept else model.state_dict()
        assert torch.equal(tensor, source[name]), name


@pytest.mark.parametrize("features", [FPN(channels=8), C4()], ids=["FPN", "C4"])
def test_imagenet_backbone(features, tmp_path):
    classifier = models.resnet18(weights=None)
    for buffer in classifier.buffers():
        buffer.copy_(torch.rand(buffer.shape))
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="expected a detector, got a backbone"):
        load_model(tmp_path / "resnet18.pth")

    c4 = isinstance(features, C4)
    box = AverageBox() if c4 else SMALL.box
    model = build(replace(SMALL, features=features, box=box, input=InputConfig(channels="BGR")))
    left = load_weights(model, tmp_path / "resnet18.pth")
    assert {name.split(".")[0] for name in left.missing if not name.startswith("backbone.fpn.")} == {
        *("rpn", "box_head", "mask_head", "keypoint_head")
    }
    assert any(name.startswith("backbone.fpn.") for name in left.missing) != c4
    assert (left.unexpected, left.shapes, left.settings) == ([], {}, {"input.channels": ("BGR", "RGB")})
    loaded, source = model.state_dict(), classifier.state_dict()
    assert torch.equal(loaded["backbone.bn1.running_var"], source["bn1.running_var"])
    last = "roi_features.res5" if c4 else "backbone.layer4"
    assert torch.equal(loaded[f"{last}.1.conv2.weight"], source["layer4.1.conv2.weight"])


def test_a_branch_that_the_model_lacks(small, small_file):
    model = build(replace(SMALL, keypoint=None))
    model.state_dict()["mask_head.mask_logits.weight"].zero_()
    left = load_weights(model, small_file)
    assert {name.split(".")[0] for name in left.unexpected} == {"keypoint_head"}
    assert not left.missing
    assert not left.settings
    name = "mask_head.mask_logits.weight"
    assert torch.equal(model.state_dict()[name], small.state_dict()[name])


def test_weights_of_another_network_are_refused(small_file):
    model = build(replace(SMALL, backbone=BackboneConfig(depth=34), box=replace(SMALL.box, fc_channels=4)))
    before = model.backbone.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"small\.pth: expected weights that fit the model") as error:
        load_weights(model, small_file)
    assert "missing from the file: backbone.layer3.5.conv1.weight" in str(error.value)
    assert "of another shape: box_head.fcs.0.bias: [4] in the model, [8] in the file" in str(error.value)
    assert torch.equal(model.backbone.conv1.weight, before)


def test_weights_of_nothing_known_are_refused(tmp_path):
    path = tmp_path / "vgg.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"vgg\.pth: expected weights of .*, got features\.0\.weight"):
        load_model(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r"vgg\.pth: expected a dictionary, got Tensor"):
        load_model(path)


class Call:
    """Pickles as a call of `os.mkdir`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_call_is_made(tmp_path):
    path, mark = tmp_path / "model.pth", tmp_path / "called"
    torch.save({"model": Call(mark)}, path)
    with pytest.raises(ValueError, match=r"model\.pth: expected tensors and plain values"):
        load_model(path)
    path.write_bytes(pickle.dumps(Call(mark), 2))
    with pytest.raises(ValueError, match=r"model\.pth: expected tensors and plain values"):
        load_model(path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", b"<html>"], ids=["empty", "zip", "text", "page"])
def test_damaged_files_are_named(suffix, content, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\{suffix}: "):
        load_model(path)
