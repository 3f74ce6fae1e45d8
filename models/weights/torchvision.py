"""torchvision's weights: Faster, Mask and Keypoint R-CNN of both generations, and ImageNet backbones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from torchvision.models import get_model_weights

from models.config import FPN, BackboneConfig, ModelConfig, RoIAlign
from models.distributed import barrier, rank
from models.weights.architecture import Weights, backbone_of, network_of
from models.weights.categories import categories_for

# torchvision's names of the ResNets by depth, groups and width per group
_RESNETS = {
    (18, 1, 64): "resnet18",
    (34, 1, 64): "resnet34",
    (50, 1, 64): "resnet50",
    (101, 1, 64): "resnet101",
    (101, 64, 4): "resnext101_64x4d",
    (101, 32, 8): "resnext101_32x8d",
}
# torchvision's names of a detector's modules, except for those of the ResNet, and fastmask's
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

    A state dict does not hold the epsilon of the batch norms. Trainable batch norms, which all detectors of the second
    generation have, are given 1e-5. Frozen ones are given 0, which is the value of the published files, of the models
    that `weights="DEFAULT"` builds from them, and of models fine-tuned from those. A model that was trained from an
    ImageNet backbone has 1e-5 in frozen batch norms.

    Args:
        state: tensors under torchvision's names, of either generation, from versions before and since 0.13.

    Returns:
        Tensors under fastmask's names, the config that they imply, and COCO's categories if their number is that of
        COCO. Tensors of unknown names keep them, so that they can be reported.

    Raises:
        ValueError: the tensors imply a depth or a number of anchors that fastmask does not support.
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
    """Convert the state dict of one of torchvision's ImageNet ResNets, without its classifier.

    Args:
        state: tensors under torchvision's names.

    Returns:
        Tensors under fastmask's names, and a config of which only `backbone` is implied by them.

    Raises:
        ValueError: the depth is not one of `BackboneConfig`.
    """
    tensors = {f"backbone.{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}
    return Weights(tensors, ModelConfig(backbone=backbone_of(tensors)), categories=None)


def download_backbone(config: BackboneConfig) -> Path:
    """Download torchvision's ImageNet weights of a backbone, unless the file exists.

    Under `torchrun`, the first process downloads the file.

    Args:
        config: depth, groups, width.

    Returns:
        The path of the file, in the cache of `torch.hub`.

    Raises:
        ValueError: torchvision publishes no such backbone, or the download fails.
    """
    shape = config.depth, config.groups, config.width_per_group
    if shape not in _RESNETS:
        published = ", ".join(map(str, _RESNETS))
        raise ValueError(f"weights: expected --weights FILE or a (depth, groups, width) of {published}, got {shape}")
    published = get_model_weights(_RESNETS[shape])["IMAGENET1K_V1"]
    path = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
    try:
        if rank() == 0 and not path.exists():
            published.get_state_dict(progress=True, check_hash=True)
    except URLError as error:
        raise ValueError(f"weights: expected {published.url} or --weights FILE, got {error}") from error
    barrier()
    return path


def _rename(name: str) -> str:
    """fastmask's name of a tensor, or the given name if there is none."""
    if name.startswith("backbone.body."):
        return name.replace("backbone.body.", "backbone.")
    module, _, leaf = name.rpartition(".")
    return f"{_MODULES[module]}.{leaf}" if module in _MODULES else name
