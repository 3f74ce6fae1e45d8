"""What a file of weights holds, under our names, and the network that the names and shapes imply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Literal

from torch import Tensor

from models.config import (
    BackboneConfig,
    BoxHeadConfig,
    FPNConfig,
    KeypointHeadConfig,
    MaskHeadConfig,
    ModelConfig,
    Norm,
    RPNConfig,
)
from models.structures import Category

# Blocks in layer3 and whether they are bottlenecks
_DEPTHS: dict[tuple[int, bool], Literal[18, 34, 50, 101]] = {
    (2, False): 18,
    (6, False): 34,
    (6, True): 50,
    (23, True): 101,
}


@dataclass(frozen=True)
class Weights:
    """Tensors under our names, the network that they fill, and what its labels mean.

    Of a backbone alone, `categories` is None and of `config` only `input` and `backbone` say anything.
    """

    tensors: dict[str, Tensor]
    config: ModelConfig
    categories: tuple[Category, ...] | None


def backbone_of(tensors: Mapping[str, Tensor]) -> BackboneConfig:
    """Depth, groups, width and kind of batch norm of `backbone.*`.

    Raises:
        ValueError: the depth is none of ours.
    """
    blocks = len({name.split(".")[2] for name in tensors if name.startswith("backbone.layer3.")})
    bottleneck = "backbone.layer1.0.conv3.weight" in tensors
    if (blocks, bottleneck) not in _DEPTHS:
        kind = "bottlenecks" if bottleneck else "basic blocks"
        raise ValueError(f"backbone.layer3: expected the blocks of ResNet-18, 34, 50 or 101, got {blocks} {kind}")
    width, width_per_group = tensors["backbone.layer1.0.conv2.weight"].shape[:2]
    return BackboneConfig(
        depth=_DEPTHS[blocks, bottleneck],
        groups=width // width_per_group,
        width_per_group=width_per_group,
        # Frozen statistics are constants and count nothing
        norm="batch" if "backbone.bn1.num_batches_tracked" in tensors else "frozen",
    )


def network_of(tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The network that a detector's tensors fill; what they do not tell stays at its default.

    Raises:
        ValueError: the depth is none of ours, or the number of anchors is not the usual one.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    fpn, mask, keypoint = None, None, None
    if "fpn.lateral.0.conv.weight" in shapes:
        fpn = FPNConfig(shapes["fpn.lateral.0.conv.weight"][0], _norm(shapes, "fpn.lateral.0"))
    if "mask_head.deconv.weight" in shapes:
        convs = _convs(shapes, "mask_head")
        channels = shapes["mask_head.deconv.weight"][1]
        mask = MaskHeadConfig(convs=convs, channels=channels, norm=_norm(shapes, "mask_head.convs.0"))
    if "keypoint_head.deconv.weight" in shapes:
        channels, keypoints = shapes["keypoint_head.deconv.weight"][:2]
        keypoint = KeypointHeadConfig(keypoints, convs=_convs(shapes, "keypoint_head"), channels=channels)

    rpn = RPNConfig(convs=_convs(shapes, "rpn"))
    per_position = len(rpn.anchors.aspect_ratios) * (1 if fpn else len(rpn.anchors.sizes))
    if (got := shapes["rpn.objectness.weight"][0]) != per_position:
        raise ValueError(f"rpn.objectness: expected {per_position} anchors at each position, got {got}")
    return ModelConfig(
        classes=shapes["box_head.class_logits.weight"][0] - 1,
        backbone=backbone_of(tensors),
        fpn=fpn,
        rpn=rpn,
        box=_box_head(shapes),
        mask=mask,
        keypoint=keypoint,
    )


def _box_head(shapes: Mapping[str, tuple[int, ...]]) -> BoxHeadConfig:
    if "box_head.fcs.0.weight" not in shapes:
        return BoxHeadConfig(fcs=0)
    convs = _convs(shapes, "box_head")
    channels = shapes["box_head.convs.0.conv.weight"][0] if convs else shapes["rpn.objectness.weight"][1]
    fc_channels, features = shapes["box_head.fcs.0.weight"]
    return BoxHeadConfig(
        resolution=isqrt(features // channels),
        convs=convs,
        conv_channels=channels,
        fcs=sum(name.startswith("box_head.fcs.") and name.endswith(".weight") for name in shapes),
        fc_channels=fc_channels,
        norm=_norm(shapes, "box_head.convs.0"),
    )


def _convs(shapes: Mapping[str, tuple[int, ...]], head: str) -> int:
    return sum(name.startswith(f"{head}.convs.") and name.endswith(".conv.weight") for name in shapes)


def _norm(shapes: Mapping[str, tuple[int, ...]], layer: str) -> Norm:
    return "batch" if f"{layer}.norm.running_mean" in shapes else "none"
