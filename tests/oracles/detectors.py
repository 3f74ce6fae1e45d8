"""torchvision's and fastmask's detectors with the same random weights, made to detect something.

Nothing is trained. Batch norms take the statistics of an image, the pyramid's levels and the residual branches are
scaled (`calibrate`), and the classifier is scaled until its scores are like a trained one's. Images have structure: on
white noise, which is the same everywhere, scores differ so little that rounding chooses the boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2 import functional

from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS
from models.weights.torchvision import convert_detector

BACKBONES = {  # torchvision's names of the backbones of the presets that it can build
    "R-18-FPN": "resnet18",
    "R-50-FPN": "resnet50",
    "R-101-FPN": "resnet101",
    "X-101-FPN": "resnext101_64x4d",
    "R-50-FPN-keypoint": "resnet50",
}
RESIDUAL_SCALE = 0.25  # gamma of a residual branch's last norm: at 1, random layers amplify the rounding of bfloat16


def build(name: str, size: int, *, proposals: int, detections: int, **options: Any) -> nn.Module:
    """An untrained torchvision detector that gives `detections` of each image.

    Args:
        name: the name of torchvision's function.
        size: the shorter side of the images; the longer side may be twice that.
        proposals: the number of proposals of each level before NMS; an eighth of them remain after it.
        detections: the number of detections of each image.
        options: further arguments of torchvision's function.
    """
    torch.manual_seed(0)
    model = getattr(detection, name)(
        weights=None,
        weights_backbone=None,
        num_classes=2 if name.startswith("keypoint") else 4,
        min_size=size,
        max_size=2 * size,
        rpn_pre_nms_top_n_test=proposals,
        rpn_post_nms_top_n_test=proposals // 8,
        box_score_thresh=0.0,
        box_detections_per_img=detections,
        **options,
    )
    g = torch.Generator().manual_seed(1)
    calibrate(model, torch.rand(3, size, size + 16, generator=g))
    return model.eval()


def torchvision_detector(preset: str, size: Sequence[int], *, frozen: bool = True) -> Any:
    """The preset as torchvision builds it, on the CPU.

    Args:
        preset: one of `BACKBONES`.
        size: (height, width) of the images.
        frozen: whether batch norms, the stem and res2 are frozen, as in torchvision's published models.
    """
    config = PRESETS[preset].model
    backbone = resnet_fpn_backbone(
        backbone_name=BACKBONES[preset],
        weights=None,
        norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d,
        trainable_layers=3 if frozen else 5,
    )
    kind = detection.MaskRCNN if config.keypoint is None else detection.KeypointRCNN
    # In training, the only mode with this option, torchvision skips the resize that these images do not need.
    model = kind(backbone, config.classes + 1, min_size=min(size), max_size=max(size), _skip_resize=True)
    image = textured_image(320, 320) / 255
    calibrate(model, image)
    _sharpen(model.roi_heads.box_predictor.cls_score, lambda: model([image]))
    return model


def fastmask_detector(peer: Any) -> MaskRCNN:
    """fastmask's detector, on the CPU, with the weights and conventions of one of torchvision's."""
    weights = convert_detector(peer.state_dict())
    config = weights.config
    frozen_stages = config.backbone.frozen_stages if config.backbone.norm == "frozen" else 0
    config = replace(
        config,
        input=replace(config.input, min_size=peer.transform.min_size[0], max_size=peer.transform.max_size),
        backbone=replace(config.backbone, norm_eps=1e-5, frozen_stages=frozen_stages),
    )
    model = MaskRCNN(config)
    model.load_state_dict(weights.tensors)
    return model.eval()


def c4_detector(preset: str, size: Sequence[int]) -> MaskRCNN:
    """A C4, which torchvision does not have, with its batch norms folded as frozen ones are."""
    config = PRESETS[preset].model
    config = replace(
        config,
        input=replace(config.input, min_size=min(size), max_size=max(size)),
        backbone=replace(config.backbone, norm="batch", frozen_stages=0),
    )
    model = MaskRCNN(config).train()
    pixels = textured_image(320, 320).float()
    x = functional.normalize(pixels, list(config.input.pixel_mean), list(config.input.pixel_std))
    with torch.no_grad():
        features = _settle(model.backbone, x[None])[-1]
        model.rpn.convs[0].conv.weight /= features.std()
        _settle(model.roi_features.res5, features)
    model.eval()
    _sharpen(model.box_head.class_logits, lambda: model.detect([textured_image(320, 320)]))
    return model


@torch.no_grad()
def calibrate(model: Any, image: Tensor) -> None:
    """Give random weights statistics: untrained, features grow from layer to layer until no box is finite.

    Args:
        model: one of torchvision's detectors.
        image: `[3, H, W]`, 0..1.
    """
    levels = _settle(model.eval().backbone, model.transform.normalize(image)[None])
    for block, level in zip(model.backbone.fpn.layer_blocks, levels.values(), strict=False):  # P6 has no weights
        block[0].weight /= level.std()


@torch.no_grad()
def _sharpen(layer: nn.Linear, run: Callable[[], object]) -> None:
    """Scale a classifier until two classes of a region, or one region in two of one class, have a score above 0.05."""
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    run()
    hook.remove()
    scale = 2 / outputs[0].std()
    logits = outputs[0] * scale
    regions, classes = len(logits), logits.shape[1] - 1
    low, high = -30.0, 30.0
    background = 0.0
    for _ in range(20):
        background = (low + high) / 2
        shifted = torch.cat([logits[:, :1] + background, logits[:, 1:]], 1)
        above = (shifted.softmax(1)[:, 1:] > 0.05).sum()
        low, high = (background, high) if above > min(2, classes / 2) * regions else (low, background)
    layer.weight *= scale
    layer.bias *= scale
    layer.bias[0] += background


def _settle(network: nn.Module, x: Tensor) -> Any:
    """The network's output for x, with the statistics of each batch norm set to those of its input."""

    def take(norm: Any, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_var.copy_(variance)
        norm.running_mean.copy_(mean)

    hooks = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            hooks.append(module.register_forward_pre_hook(take))
        if last_norm := getattr(module, "bn3", None):
            last_norm.weight.fill_(RESIDUAL_SCALE)
    result = network(x)
    for hook in hooks:
        hook.remove()
    return result


def textured_image(height: int, width: int, seed: int = 0) -> Tensor:
    """`[3, height, width]` uint8, with structure of all sizes."""
    g = torch.Generator().manual_seed(seed)
    octaves = [torch.randn(1, 3, height // s + 1, width // s + 1, generator=g) for s in (8, 16, 32, 64, 128)]
    layers = [F.interpolate(octave, size=(height, width), mode="bicubic")[0] for octave in octaves]
    return (128 + 60 * torch.stack(layers).sum(0) / len(layers) ** 0.5).clamp(0, 255).to(torch.uint8)
