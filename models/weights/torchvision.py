"""torchvision's weights: Faster, Mask and Keypoint R-CNN of both generations, and ImageNet backbones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from models.config import FPN, ModelConfig, RoIAlign
from models.weights.architecture import Weights, backbone_of, network_of
from models.weights.categories import categories_for

# Names of modules in torchvision's detectors, except for the ResNet's, and in fastmask's
_MODULES = {
    **{f"backbone.fpn.inner_blocks.{i}.0": f"backbone.fpn.lateral.{i}.conv" for i in range(4)},
    **{f"backbone.fpn.inner_blocks.{i}.1": f"backbone.fpn.lateral.{i}.norm" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}.0": f"backbone.fpn.output.{i}.conv" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}.1": f"backbone.fpn.output.{i}.norm" for i in range(4)},
    **{f"rpn.head.conv.{i}.0": f"rpn.convs.{i}.conv" for i in range(2)},
    "rpn.head.cls_logits": "rpn.objectness",
    "rpn.head.bbox_pred": "rpn.deltas",
    "roi_heads.box_head.fc6": "box_head.fcs.0",
    "roi_heads.box_head.fc7": "box_head.fcs.1",
    **{f"roi_heads.box_head.{i}.0": f"box_head.convs.{i}.conv" for i in range(4)},
    **{f"roi_heads.box_head.{i}.1": f"box_head.convs.{i}.norm" for i in range(4)},
    "roi_heads.box_head.5": "box_head.fcs.0",
    "roi_heads.box_predictor.cls_score": "box_head.class_logits",
    "roi_heads.box_predictor.bbox_pred": "box_head.deltas",
    **{f"roi_heads.mask_head.{i}.0": f"mask_head.convs.{i}.conv" for i in range(4)},
    **{f"roi_heads.mask_head.{i}.1": f"mask_head.convs.{i}.norm" for i in range(4)},
    "roi_heads.mask_predictor.conv5_mask": "mask_head.deconv",
    "roi_heads.mask_predictor.mask_fcn_logits": "mask_head.mask_logits",
    **{f"roi_heads.keypoint_head.{2 * i}": f"keypoint_head.convs.{i}.conv" for i in range(8)},
    "roi_heads.keypoint_predictor.kps_score_lowres": "keypoint_head.deconv",
    # Names before torchvision 0.13, which the published files of the first generation still have
    **{f"backbone.fpn.inner_blocks.{i}": f"backbone.fpn.lateral.{i}.conv" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}": f"backbone.fpn.output.{i}.conv" for i in range(4)},
    "rpn.head.conv": "rpn.convs.0.conv",
    **{f"roi_heads.mask_head.mask_fcn{i + 1}": f"mask_head.convs.{i}.conv" for i in range(4)},
}


def convert_detector(state: Mapping[str, Tensor]) -> Weights:
    """Convert the state dict of one of torchvision's detectors, with any classes, keypoints and ResNet.

    A state dict does not hold the epsilon of the batch norms. It is taken as 1e-5 for trainable batch norms (all of
    the second generation), and as 0 for frozen ones: so it is in the published files, in the models that
    `weights="DEFAULT"` builds from them, and in models fine-tuned from those. In a model that was trained from an
    ImageNet backbone, frozen batch norms have 1e-5.

    Args:
        state: tensors under torchvision's names, of either generation and before or after version 0.13.

    Returns:
        Tensors under fastmask's names; names that fastmask does not know are kept, so that they can be reported.

    Raises:
        ValueError: see `network_of`.
    """
    tensors = {_rename(name): tensor for name, tensor in state.items()}
    # torchvision predicts a box and a mask of the background too, which are neither trained nor used
    for name, rows in (("box_head.deltas", 4), ("mask_head.mask_logits", 1)):
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in tensors:
                tensors[key] = tensors[key][rows:]
    network = network_of(tensors)
    features = network.features
    if isinstance(features, FPN):
        features = replace(features, level_rounding="torchvision")
    config = replace(
        network,
        backbone=replace(network.backbone, norm_eps=0.0 if network.backbone.norm == "frozen" else 1e-5),
        features=features,
        rpn=replace(network.rpn, anchors=replace(network.rpn.anchors, rounded=True)),
        pooling=RoIAlign(sampling_ratio=2, aligned=False),
        mask=network.mask and replace(network.mask, paste="torchvision"),
    )
    return Weights(tensors, config, categories_for(config.classes, config.keypoint and config.keypoint.keypoints))


def convert_backbone(state: Mapping[str, Tensor]) -> Weights:
    """Convert the state dict of one of torchvision's ImageNet ResNets; its last layer, the classifier, is left out."""
    tensors = {f"backbone.{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}
    return Weights(tensors, ModelConfig(backbone=backbone_of(tensors)), categories=None)


def _rename(name: str) -> str:
    """fastmask's name of a tensor, or the same name if there is none."""
    if name.startswith("backbone.body."):
        return name.replace("backbone.body.", "backbone.")
    module, _, leaf = name.rpartition(".")
    return f"{_MODULES[module]}.{leaf}" if module in _MODULES else name
