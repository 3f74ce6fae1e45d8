"""The network that the names and shapes of a file's tensors imply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal

from torch import Tensor

from models.config import (
    C4,
    FPN,
    AverageBox,
    BackboneConfig,
    FCBox,
    FCNMask,
    KeypointHeadConfig,
    ModelConfig,
    Norm,
    RPNConfig,
)
from models.structures import Category

Shapes = Mapping[str, Sequence[int]]

# By the number of blocks in layer3, and whether they are bottlenecks
_DEPTHS: dict[tuple[int, bool], Literal[18, 34, 50, 101]] = {
    (2, False): 18,
    (6, False): 34,
    (6, True): 50,
    (23, True): 101,
}


@dataclass(frozen=True)
class Weights:
    """The content of a file of weights: tensors under fastmask's names, the config and the categories of the model."""

    tensors: dict[str, Tensor]
    config: ModelConfig  # for a backbone alone, only `input` and `backbone` are meaningful
    categories: tuple[Category, ...] | None  # None for a backbone alone


def backbone_of(tensors: Mapping[str, Tensor]) -> BackboneConfig:
    """The backbone's depth, groups, width and kind of batch norm.

    Args:
        tensors: under fastmask's names; those of `backbone.*` are read.

    Raises:
        ValueError: the depth is not one of `BackboneConfig`.
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
        # Frozen batch norms do not count batches
        norm="batch" if "backbone.bn1.num_batches_tracked" in tensors else "frozen",
    )


def network_of(tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The config that a detector's tensors imply. Settings that do not affect names or shapes have their defaults.

    Args:
        tensors: under fastmask's names.

    Raises:
        ValueError: the depth is not one of `BackboneConfig`, or the number of anchors is not the default one.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    features, mask, keypoint = C4(), None, None
    if "backbone.fpn.lateral.0.conv.weight" in shapes:
        channels = shapes["backbone.fpn.lateral.0.conv.weight"][0]
        features = FPN(channels, _norm(shapes, "backbone.fpn.lateral.0"))
    if "mask_head.deconv.weight" in shapes:
        convs = _convs(shapes, "mask_head")
        channels = shapes["mask_head.deconv.weight"][1]
        mask = FCNMask(convs=convs, channels=channels, norm=_norm(shapes, "mask_head.convs.0"))
    if "keypoint_head.deconv.weight" in shapes:
        channels, keypoints = shapes["keypoint_head.deconv.weight"][:2]
        keypoint = KeypointHeadConfig(keypoints, convs=_convs(shapes, "keypoint_head"), channels=channels)

    rpn = RPNConfig(convs=_convs(shapes, "rpn"))
    per_position = len(rpn.anchors.aspect_ratios) * (1 if isinstance(features, FPN) else len(rpn.anchors.sizes))
    if (got := shapes["rpn.objectness.weight"][0]) != per_position:
        raise ValueError(f"rpn.objectness: expected {per_position} anchors at each position, got {got}")
    return ModelConfig(
        classes=shapes["box_head.class_logits.weight"][0] - 1,
        backbone=backbone_of(tensors),
        features=features,
        rpn=rpn,
        box=_box_head(shapes),
        mask=mask,
        keypoint=keypoint,
    )


def _box_head(shapes: Shapes) -> FCBox | AverageBox:
    if "box_head.fcs.0.weight" not in shapes:
        return AverageBox()
    convs = _convs(shapes, "box_head")
    channels = shapes["box_head.convs.0.conv.weight"][0] if convs else shapes["rpn.objectness.weight"][1]
    fc_channels, inputs = shapes["box_head.fcs.0.weight"]
    return FCBox(
        resolution=isqrt(inputs // channels),
        convs=convs,
        conv_channels=channels,
        fcs=sum(name.startswith("box_head.fcs.") and name.endswith(".weight") for name in shapes),
        fc_channels=fc_channels,
        norm=_norm(shapes, "box_head.convs.0"),
    )


def _convs(shapes: Shapes, head: str) -> int:
    return sum(name.startswith(f"{head}.convs.") and name.endswith(".conv.weight") for name in shapes)


def _norm(shapes: Shapes, layer: str) -> Norm:
    return "batch" if f"{layer}.norm.running_mean" in shapes else "none"
