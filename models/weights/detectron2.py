"""Weights of detectron2: Faster, Mask and Keypoint R-CNN of its model zoo, with an FPN or a C4."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from models.config import C4, InputConfig, ModelConfig, RoIAlign
from models.weights.architecture import Weights, network_of
from models.weights.categories import categories_for

# detectron2's names of a detector's modules, except for those of the ResNet, and fastmask's. A norm is a child of its
# convolution in detectron2, and a sibling in fastmask.
_CONVS = {
    **{f"backbone.fpn_lateral{i + 2}": f"backbone.fpn.lateral.{i}" for i in range(4)},
    **{f"backbone.fpn_output{i + 2}": f"backbone.fpn.output.{i}" for i in range(4)},
    **{f"roi_heads.box_head.conv{i + 1}": f"box_head.convs.{i}" for i in range(4)},
    **{f"roi_heads.mask_head.mask_fcn{i + 1}": f"mask_head.convs.{i}" for i in range(4)},
    **{f"roi_heads.keypoint_head.conv_fcn{i + 1}": f"keypoint_head.convs.{i}" for i in range(8)},
    "proposal_generator.rpn_head.conv": "rpn.convs.0",
    **{f"proposal_generator.rpn_head.conv.conv{i}": f"rpn.convs.{i}" for i in range(2)},
}
_MODULES = {
    **{source: f"{name}.conv" for source, name in _CONVS.items()},
    **{f"{source}.norm": f"{name}.norm" for source, name in _CONVS.items()},
    "proposal_generator.rpn_head.objectness_logits": "rpn.objectness",
    "proposal_generator.rpn_head.anchor_deltas": "rpn.deltas",
    "roi_heads.box_head.fc1": "box_head.fcs.0",
    "roi_heads.box_head.fc2": "box_head.fcs.1",
    "roi_heads.box_predictor.cls_score": "box_head.class_logits",
    "roi_heads.box_predictor.bbox_pred": "box_head.deltas",
    "roi_heads.mask_head.deconv": "mask_head.deconv",
    "roi_heads.mask_head.predictor": "mask_head.mask_logits",
    "roi_heads.keypoint_head.score_lowres": "keypoint_head.deconv",
}
_RESNET = re.compile(r"backbone\.(?:bottom_up\.)?(stem|res[2-5]\.\d+)\.(conv[123]|shortcut)(\.norm)?\.(\w+)")
_RES5_HEAD = re.compile(r"roi_heads\.res5\.(\d+)\.(conv[123]|shortcut)(\.norm)?\.(\w+)")
_LAYERS = {"conv1": ("conv1", "bn1"), "conv2": ("conv2", "bn2"), "conv3": ("conv3", "bn3")}
_LAYERS["shortcut"] = ("downsample.0", "downsample.1")
# Constants that older versions of detectron2 stored with the weights; `_conventions` reads those of the pixels
_CONSTANTS = ("proposal_generator.anchor_generator.", "pixel_mean", "pixel_std")


def convert(state: Mapping[str, Tensor]) -> Weights:
    """Convert the state dict of one of detectron2's detectors, with the conventions of the model zoo.

    A state dict does not hold the normalisation of images or the position of the stride in bottlenecks. The ResNets of
    the zoo are those of the original paper: only the mean is subtracted from pixels, and the stride is in the 1x1
    convolution. For the ResNeXts, pixels are divided by their standard deviation too, and the stride is in the 3x3
    convolution. Both take BGR.

    Args:
        state: tensors under detectron2's names.

    Returns:
        Tensors under fastmask's names, the config that they imply, and COCO's categories if their number is that of
        COCO. Tensors of unknown names keep them, so that they can be reported.

    Raises:
        ValueError: the tensors imply a depth or a number of anchors that fastmask does not support.
    """
    tensors = {_rename(name): tensor for name, tensor in state.items() if not name.startswith(_CONSTANTS)}
    for leaf in ("weight", "bias"):  # in detectron2 the background is the last class
        name = f"box_head.class_logits.{leaf}"
        tensors[name] = tensors[name].roll(1, 0)
    # The oldest files have no statistics of batch norms, which are folded into scale and shift
    for name in [name for name in tensors if re.search(r"(bn\d|downsample\.1)\.weight$", name)]:
        prefix = name.removesuffix("weight")
        tensors.setdefault(f"{prefix}running_mean", torch.zeros_like(tensors[name]))
        tensors.setdefault(f"{prefix}running_var", torch.ones_like(tensors[name]))
    config = _conventions(network_of(tensors), state)
    return Weights(tensors, config, categories_for(config.classes, config.keypoint and config.keypoint.keypoints))


def _conventions(network: ModelConfig, state: Mapping[str, Tensor]) -> ModelConfig:
    resnext = network.backbone.groups > 1
    mean, std = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395) if resnext else (1.0, 1.0, 1.0)
    if "pixel_mean" in state:
        mean, std = (tuple(state[name].flatten().tolist()) for name in ("pixel_mean", "pixel_std"))
    config = replace(
        network,
        input=InputConfig(pixel_mean=mean, pixel_std=std, channels="BGR"),
        backbone=replace(network.backbone, stride_in_1x1=not resnext),
        pooling=RoIAlign(sampling_ratio=0, aligned=True),
        box=replace(network.box, min_box_size=0.0),
    )
    if not isinstance(config.features, C4):
        return config
    return replace(
        config,
        input=replace(config.input, divisor=1),
        features=C4(res5_stride=2),
        rpn=replace(config.rpn, pre_nms_top_k=6000, proposals=1000),
        box=replace(config.box, resolution=14),
    )


def _rename(name: str) -> str:
    """fastmask's name of a tensor, or the given name if there is none."""
    if match := _RESNET.fullmatch(name):
        part, layer, norm, leaf = match.groups()
        layer = _LAYERS[layer][norm is not None]
        if part == "stem":
            return f"backbone.{layer}.{leaf}"
        stage, block = part.removeprefix("res").split(".")
        return f"backbone.layer{int(stage) - 1}.{block}.{layer}.{leaf}"
    if match := _RES5_HEAD.fullmatch(name):
        block, layer, norm, leaf = match.groups()
        return f"roi_features.res5.{block}.{_LAYERS[layer][norm is not None]}.{leaf}"
    module, _, leaf = name.rpartition(".")
    return f"{_MODULES[module]}.{leaf}" if module in _MODULES else name
