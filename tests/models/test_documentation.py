"""The Python code in the documentation runs unchanged, and models.md names the presets and losses of the code."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models.detection import maskrcnn_resnet50_fpn

import fastmask
from benchmarks.harness.operators import ROOT
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS
from models.structures import Category
from models.weights import checkpoint

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]


def blocks(path):
    """The Python code blocks of a file."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


def test_getting_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    torch.manual_seed(0)
    model = MaskRCNN(PRESETS["demo"].model)
    with torch.no_grad():
        model.box_head.class_logits.bias[1] += 9  # otherwise an untrained model detects nothing
    path, image = Path("runs/demo/model.pth"), Path("runs/shapes/val2017/000000000001.jpg")
    for folder in (path.parent, image.parent):
        folder.mkdir(parents=True)
    checkpoint.save(path, model, [Category(id, f"category {id}") for id in range(1, 81)])
    Image.new("RGB", (160, 120), (90, 120, 60)).save(image)

    (code,) = blocks("docs/getting-started.md")
    assert len([line for line in code.splitlines() if line]) <= 10
    names = {}
    *lines, last = code.rstrip().splitlines()
    exec("\n".join(lines), names)
    shown = eval(last, names)
    assert isinstance(shown, Image.Image)
    detections = names["detections"]
    count = len(detections)
    assert count > 0
    assert detections.boxes.shape == (count, 4)
    assert detections.scores.shape == detections.labels.shape == (count,)
    assert detections.masks().shape == (count, 120, 160)
    assert detections.masks().dtype == torch.bool
    assert detections.keypoints is None
    assert detections.keypoint_scores is None
    assert len(detections[detections.scores > 0.5]) <= count
    assert len(detections.to("cpu")) == count


def test_models_names_the_presets_and_the_losses():
    text = (ROOT / "docs/models.md").read_text()
    table = text.partition("| preset | |\n|---|---|\n")[2].partition("\n\n")[0]
    names = [name for row in table.splitlines() for name in re.findall(r"`(.*?)`", row.split("|")[1])]
    assert sorted(names) == sorted(PRESETS)
    returned = set(re.findall(r"`(loss_\w+)`", MaskRCNN.losses.__doc__))
    assert set(re.findall(r"`(loss_\w+)`", text)) == returned


def test_the_code_of_the_readme():
    accelerated, direct = blocks("README.md")
    names = {"model": maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)}
    exec(accelerated, names)
    assert isinstance(names["model"].roi_heads.box_roi_pool, fastmask.MultiScaleRoIAlign)
    exec(direct, names)
    assert isinstance(names["pool"], fastmask.MultiScaleRoIAlign)
    assert names["nms"] is fastmask.nms
