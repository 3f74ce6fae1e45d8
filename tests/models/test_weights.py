"""Conversion of torchvision's and detectron2's weights: names and values of tensors, network and conventions."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from models.config import C4, FPN, AverageBox, BackboneConfig, FCBox, FCNMask, InputConfig, KeypointHeadConfig, RoIAlign
from models.network.mask_rcnn import MaskRCNN
from models.network.resnet import ResNet
from models.structures import Category
from models.weights import detectron2 as weights_detectron2
from models.weights import torchvision as weights_torchvision
from models.weights.categories import COCO, COCO_IDS, COCO_PERSON
from models.weights.checkpoint import load_model

pytestmark = pytest.mark.reference_only


def numbered(shapes):
    """Tensors of these shapes, each filled with a different value, in the memory of one element each."""
    return {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items(), 1)}


def value(tensor):
    return tensor.flatten()[0].item()


def assert_filled(weights, places, state):
    """Exactly the network's tensors, in their shapes, each from a different source; `places` gives some sources."""
    with torch.device("meta"):
        expected = MaskRCNN(weights.config).state_dict()
    assert {name: tensor.shape for name, tensor in weights.tensors.items()} == {k: t.shape for k, t in expected.items()}
    assert {value(tensor) for tensor in weights.tensors.values()} == {value(tensor) for tensor in state.values()}
    for name, source in places.items():
        assert value(weights.tensors[name]) == value(state[source]), name


def torchvision_state(name):
    with torch.device("meta"):
        model = getattr(detection, name)(weights=None, weights_backbone=None)
    return numbered({key: tensor.shape for key, tensor in model.state_dict().items()})


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn", "keypointrcnn", "fasterrcnn v2", "maskrcnn v2"])
def test_torchvision(kind):
    kind, _, second = kind.partition(" ")
    state = torchvision_state(f"{kind}_resnet50_fpn{'_v2' if second else ''}")
    weights = weights_torchvision.convert_detector(state)
    places = {
        "backbone.layer3.5.bn2.running_var": "backbone.body.layer3.5.bn2.running_var",
        "backbone.fpn.lateral.3.conv.weight": "backbone.fpn.inner_blocks.3.0.weight",
        "backbone.fpn.output.0.conv.weight": "backbone.fpn.layer_blocks.0.0.weight",
        "rpn.objectness.bias": "rpn.head.cls_logits.bias",
        "rpn.deltas.bias": "rpn.head.bbox_pred.bias",
        "box_head.class_logits.weight": "roi_heads.box_predictor.cls_score.weight",
        "box_head.fcs.0.weight": f"roi_heads.box_head.{'5' if second else 'fc6'}.weight",
    }
    if kind == "keypointrcnn":
        places["keypoint_head.convs.7.conv.bias"] = "roi_heads.keypoint_head.14.bias"
    if kind == "maskrcnn":
        places["mask_head.convs.3.conv.weight"] = "roi_heads.mask_head.3.0.weight"
    if second:
        places["box_head.convs.2.norm.bias"] = "roi_heads.box_head.2.1.bias"
    assert_filled(weights, places, state)

    norm = "batch" if second else "none"
    config = weights.config
    assert config.input == InputConfig()
    assert config.backbone == BackboneConfig(depth=50, norm="batch")
    assert config.features == FPN(norm=norm, level_rounding="torchvision")
    assert config.pooling == RoIAlign(sampling_ratio=2, aligned=False)
    assert config.rpn.anchors.rounded
    assert config.rpn.convs == (2 if second else 1)
    assert config.box == FCBox(convs=4 if second else 0, fcs=1 if second else 2, norm=norm)
    assert config.mask == (FCNMask(norm=norm, paste="torchvision") if kind == "maskrcnn" else None)
    assert config.keypoint == (KeypointHeadConfig() if kind == "keypointrcnn" else None)
    assert weights.categories == (COCO_PERSON if kind == "keypointrcnn" else COCO_IDS)


def test_torchvision_names_before_0_13():
    """Names in the published files of the first generation, which torchvision's models load as well."""
    state = {k: t for k, t in torchvision_state("maskrcnn_resnet50_fpn").items() if "num_batches_tracked" not in k}
    old = {}
    for name, tensor in state.items():
        renamed = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        if name.startswith("backbone.fpn."):
            renamed = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        for i in range(4):
            renamed = renamed.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        old[renamed] = tensor
    assert len(old.keys() - state.keys()) == 16 + 2 + 8
    with torch.device("meta"):
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
        detector = detection.MaskRCNN(backbone, 91)
    detector.load_state_dict({name: tensor.to("meta") for name, tensor in old.items()})  # or it raises

    weights = weights_torchvision.convert_detector(old)
    assert (weights.config.backbone.norm, weights.config.backbone.norm_eps) == ("frozen", 0.0)
    places = weights_torchvision.convert_detector(state).tensors
    assert_filled(weights, {name: name for name in places}, places)


def test_torchvision_background_is_removed():
    with torch.device("meta"):
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
        shapes = {name: tensor.shape for name, tensor in detection.MaskRCNN(backbone, 4).state_dict().items()}
    state = {name: torch.rand(shape) if "predictor" in name else torch.zeros(shape) for name, shape in shapes.items()}
    weights = weights_torchvision.convert_detector(state)
    assert weights.config.backbone == BackboneConfig(depth=18, norm_eps=0.0)
    assert weights.categories == (Category(1, "1"), Category(2, "2"), Category(3, "3"))
    box, mask = "roi_heads.box_predictor", "roi_heads.mask_predictor"
    for leaf in ("weight", "bias"):
        for name, source, rows in (
            ("box_head.class_logits", f"{box}.cls_score", 0),
            ("box_head.deltas", f"{box}.bbox_pred", 4),
            ("mask_head.mask_logits", f"{mask}.mask_fcn_logits", 1),
            ("mask_head.deconv", f"{mask}.conv5_mask", 0),
        ):
            assert torch.equal(weights.tensors[f"{name}.{leaf}"], state[f"{source}.{leaf}"][rows:]), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", BackboneConfig(depth=18, norm="batch")),
        ("resnet34", BackboneConfig(depth=34, norm="batch")),
        ("resnet50", BackboneConfig(depth=50, norm="batch")),
        ("resnet101", BackboneConfig(depth=101, norm="batch")),
        ("resnext101_64x4d", BackboneConfig(depth=101, groups=64, width_per_group=4, norm="batch")),
        ("resnext101_32x8d", BackboneConfig(depth=101, groups=32, width_per_group=8, norm="batch")),
    ],
)
def test_imagenet_backbone(name, expected):
    with torch.device("meta"):
        weights = weights_torchvision.convert_backbone(getattr(models, name)(weights=None).state_dict())
        assert weights.config.backbone == expected
        state = ResNet(weights.config.backbone).state_dict()
    backbone = {f"backbone.{name}": tensor.shape for name, tensor in state.items()}
    assert {name: tensor.shape for name, tensor in weights.tensors.items()} == backbone
    assert weights.categories is None


def test_an_unsupported_depth():
    with torch.device("meta"):
        state = models.resnet152(weights=None).state_dict()
    with pytest.raises(ValueError, match="ResNet-18, 34, 50 or 101, got 36 bottlenecks"):
        weights_torchvision.convert_backbone(state)


def test_a_backbone_without_published_weights():
    with pytest.raises(ValueError, match=r"weights: expected --weights FILE or a .*, got \(50, 2, 64\)"):
        weights_torchvision.download_backbone(BackboneConfig(groups=2))


def test_unsupported_anchors():
    state = torchvision_state("fasterrcnn_resnet50_fpn")
    for leaf in ("weight", "bias"):
        state[f"rpn.head.cls_logits.{leaf}"] = state[f"rpn.head.cls_logits.{leaf}"].repeat_interleave(2, 0)
    with pytest.raises(ValueError, match=r"rpn\.objectness: expected 3 anchors at each position, got 6"):
        weights_torchvision.convert_detector(state)


def detectron2_shapes(
    depth, groups=1, width=64, fpn=256, c4=False, classes=80, mask=False, keypoint=False, fc=1024, head=256
):
    """Names and shapes as detectron2's modules register them."""
    shapes = {}

    def conv(name, out_channels, in_channels, kernel, bias=True):
        shapes[f"{name}.weight"] = (out_channels, in_channels, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (out_channels,)
        else:
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.norm.{leaf}"] = (out_channels,)

    bottom_up = "backbone" if c4 else "backbone.bottom_up"
    conv(f"{bottom_up}.stem.conv1", 64, 3, 7, bias=False)
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]
    out_channels, in_channels = (64 if depth == 18 else 256), 64
    for stage in range(4):
        inner = groups * width * 2**stage
        for block in range(blocks[stage]):
            name = f"{'roi_heads' if c4 and stage == 3 else bottom_up}.res{stage + 2}.{block}"
            if in_channels != out_channels:
                conv(f"{name}.shortcut", out_channels, in_channels, 1, bias=False)
            if depth == 18:
                conv(f"{name}.conv1", out_channels, in_channels, 3, bias=False)
                conv(f"{name}.conv2", out_channels, out_channels, 3, bias=False)
            else:
                conv(f"{name}.conv1", inner, in_channels, 1, bias=False)
                conv(f"{name}.conv2", inner, inner // groups, 3, bias=False)
                conv(f"{name}.conv3", out_channels, inner, 1, bias=False)
            in_channels = out_channels
        if not c4:
            conv(f"backbone.fpn_lateral{stage + 2}", fpn, out_channels, 1)
            conv(f"backbone.fpn_output{stage + 2}", fpn, fpn, 3)
        out_channels *= 2

    rpn, anchors = (in_channels // 2, 15) if c4 else (fpn, 3)
    conv("proposal_generator.rpn_head.conv", rpn, rpn, 3)
    conv("proposal_generator.rpn_head.objectness_logits", anchors, rpn, 1)
    conv("proposal_generator.rpn_head.anchor_deltas", anchors * 4, rpn, 1)
    if not c4:
        shapes |= {"roi_heads.box_head.fc1.weight": (fc, fpn * 49), "roi_heads.box_head.fc1.bias": (fc,)}
        shapes |= {"roi_heads.box_head.fc2.weight": (fc, fc), "roi_heads.box_head.fc2.bias": (fc,)}
    features = in_channels if c4 else fc
    for name, rows in (("cls_score", classes + 1), ("bbox_pred", classes * 4)):
        shapes[f"roi_heads.box_predictor.{name}.weight"] = (rows, features)
        shapes[f"roi_heads.box_predictor.{name}.bias"] = (rows,)
    if mask:
        for i in range(0 if c4 else 4):
            conv(f"roi_heads.mask_head.mask_fcn{i + 1}", head, head if i else fpn, 3)
        shapes["roi_heads.mask_head.deconv.weight"] = (in_channels if c4 else head, head, 2, 2)
        shapes["roi_heads.mask_head.deconv.bias"] = (head,)
        conv("roi_heads.mask_head.predictor", classes, head, 1)
    if keypoint:
        for i in range(8):
            conv(f"roi_heads.keypoint_head.conv_fcn{i + 1}", 512, 512 if i else fpn, 3)
        shapes["roi_heads.keypoint_head.score_lowres.weight"] = (512, 17, 4, 4)
        shapes["roi_heads.keypoint_head.score_lowres.bias"] = (17,)
    return shapes


@pytest.mark.parametrize(
    ("options", "categories"),
    [
        ({"depth": 50, "mask": True}, COCO),
        ({"depth": 101}, COCO),
        ({"depth": 50, "keypoint": True, "classes": 1}, COCO_PERSON),
        ({"depth": 101, "groups": 32, "width": 8, "mask": True}, COCO),
        ({"depth": 50, "c4": True, "mask": True}, COCO),
        ({"depth": 101, "c4": True}, COCO),
    ],
    ids=["R-50-FPN mask", "R-101-FPN box", "R-50-FPN keypoint", "X-101-FPN mask", "R-50-C4 mask", "R-101-C4 box"],
)
def test_detectron2(options, categories):
    state = numbered(detectron2_shapes(**options))
    weights = weights_detectron2.convert(state)
    assert weights.categories == categories

    config, c4, resnext = weights.config, "c4" in options, "groups" in options
    std = (57.375, 57.12, 58.395) if resnext else (1.0, 1.0, 1.0)
    pixels = InputConfig(pixel_mean=(103.53, 116.28, 123.675), pixel_std=std, channels="BGR", divisor=1 if c4 else 32)
    assert config.input == pixels
    assert config.backbone == BackboneConfig(
        depth=options["depth"],
        groups=options.get("groups", 1),
        width_per_group=options.get("width", 64),
        stride_in_1x1=not resnext,
    )
    assert config.features == (C4(res5_stride=2) if c4 else FPN(level_rounding="detectron2"))
    assert config.pooling == RoIAlign(sampling_ratio=0, aligned=True)
    assert (config.rpn.pre_nms_top_k, config.rpn.proposals) == (6000 if c4 else 1000, 1000)
    box = AverageBox(resolution=14) if c4 else FCBox(resolution=7, fcs=2)
    assert config.box == replace(box, min_box_size=0.0)
    assert config.mask == (FCNMask(convs=0 if c4 else 4) if "mask" in options else None)
    assert config.keypoint == (KeypointHeadConfig() if "keypoint" in options else None)

    stem = "backbone.stem" if c4 else "backbone.bottom_up.stem"
    last = "roi_heads.res5" if c4 else "backbone.bottom_up.res5"
    places = {
        "backbone.conv1.weight": f"{stem}.conv1.weight",
        "backbone.bn1.running_mean": f"{stem}.conv1.norm.running_mean",
        f"{'roi_features.res5' if c4 else 'backbone.layer4'}.0.downsample.1.bias": f"{last}.0.shortcut.norm.bias",
        f"{'roi_features.res5' if c4 else 'backbone.layer4'}.2.conv3.weight": f"{last}.2.conv3.weight",
        "rpn.convs.0.conv.weight": "proposal_generator.rpn_head.conv.weight",
        "rpn.deltas.weight": "proposal_generator.rpn_head.anchor_deltas.weight",
        "box_head.deltas.weight": "roi_heads.box_predictor.bbox_pred.weight",
    }
    if not c4:
        places["backbone.fpn.lateral.0.conv.bias"] = "backbone.fpn_lateral2.bias"
        places["backbone.fpn.output.3.conv.bias"] = "backbone.fpn_output5.bias"
    if "mask" in options:
        places["mask_head.mask_logits.weight"] = "roi_heads.mask_head.predictor.weight"
    if "keypoint" in options:
        places["keypoint_head.convs.7.conv.weight"] = "roi_heads.keypoint_head.conv_fcn8.weight"
    assert_filled(weights, places, state)


def test_detectron2_background_comes_first():
    state = numbered(detectron2_shapes(18, classes=3))
    predictor = "roi_heads.box_predictor"
    state[f"{predictor}.cls_score.weight"] = torch.rand(4, 1024)
    state[f"{predictor}.cls_score.bias"] = torch.arange(4.0)
    weights = weights_detectron2.convert(state)
    assert weights.tensors["box_head.class_logits.bias"].tolist() == [3, 0, 1, 2]
    expected = state[f"{predictor}.cls_score.weight"][[3, 0, 1, 2]]
    assert torch.equal(weights.tensors["box_head.class_logits.weight"], expected)


def test_detectron2_pixels_and_statistics_of_old_files():
    shapes = detectron2_shapes(18)
    state = numbered({name: shape for name, shape in shapes.items() if ".running_" not in name})
    state["pixel_mean"] = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    state["pixel_std"] = torch.tensor([4.0, 5.0, 6.0])[:, None, None]
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    weights = weights_detectron2.convert(state)
    assert weights.config.input.pixel_mean == (1.0, 2.0, 3.0)
    assert weights.config.input.pixel_std == (4.0, 5.0, 6.0)
    assert torch.equal(weights.tensors["backbone.layer2.0.downsample.1.running_mean"], torch.zeros(128))
    assert torch.equal(weights.tensors["backbone.layer2.0.downsample.1.running_var"], torch.ones(128))


def test_detectron2_file(tmp_path):
    shapes = detectron2_shapes(18, fpn=4, classes=3, mask=True, fc=4, head=4)
    generator = np.random.default_rng(0)
    arrays = {name: generator.random(shape, np.float32) for name, shape in shapes.items()}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    model, categories = load_model(path, "cpu")
    assert [category.id for category in categories] == [1, 2, 3]
    converted = weights_detectron2.convert({name: torch.from_numpy(array) for name, array in arrays.items()})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, converted.tensors[name]), name
