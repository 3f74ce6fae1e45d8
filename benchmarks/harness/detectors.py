"""torchvision's detectors and ours from the same random weights, from decoded images to what is found, on the host.

As in torchvision's published models, batch norms are frozen. Nothing is trained, but there is something to detect:
batch norms, the pyramid's maps and the residual branches are scaled (`calibrate`), and pictures have structure. On
white noise, which is the same everywhere, scores differ so little that the last bits choose the boxes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, box_iou
from torchvision.transforms.v2 import functional

from benchmarks.harness.machine import Call
from benchmarks.harness.workloads import generator
from fastmask import box_ops as box_ops
from models.config import ModelConfig
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS
from models.structures import Detections, PaddedDetections
from models.weights.torchvision import convert_detector

NO_RLE = {}
if importlib.util.find_spec("pycocotools"):
    from pycocotools import mask as coco_mask

    from models.rle import encode_masks
else:
    NO_RLE = {"RLE": "pycocotools is not installed, the masks' pixels are copied to the host instead"}

BACKBONES = {  # torchvision's names
    "R-18-FPN": "resnet18",
    "R-50-FPN": "resnet50",
    "R-101-FPN": "resnet101",
    "X-101-FPN": "resnext101_64x4d",
    "R-50-FPN-keypoint": "resnet50",
}
RESIDUAL = 0.25  # gamma of a residual branch's last norm: at 1, random layers blow up what bfloat16 rounds off

Masks = list[dict[str, Any]] | Tensor  # run-length encoded, or pixels where that is not installed


@dataclass(frozen=True)
class Found:
    """What there is in an image, on the host."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Masks | None
    keypoints: Tensor | None
    exact: bool  # computed in float32 throughout


@dataclass(frozen=True)
class Agreement:
    """How alike two detectors' findings in an image have to be."""

    best: float  # the part of the detections, by score, that counts
    share: float  # of them that need a partner of their label, and of partners that have to agree
    iou: float  # of the partners' boxes
    score: float  # relative difference, rank by rank
    masks: float  # pixels that differ, over the box's area
    keypoints: float  # pixels along an axis


EXACT = Agreement(best=1.0, share=0.98, iou=0.999, score=1e-3, masks=0.01, keypoints=0.02)
ROUNDED = Agreement(best=0.5, share=0.5, iou=0.7, score=0.3, masks=0.35, keypoints=8.0)


class GraphedMaskRCNN(MaskRCNN):
    """In bfloat16, and a CUDA graph for each shape of the padded batch: one launch instead of thousands.

    What is found in a batch is overwritten by the next one of its shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, PaddedDetections]] = {}

    def _infer(self, images: Tensor, sizes: Tensor, *, compact: bool = False) -> PaddedDetections:
        assert not compact  # it waits
        if images.shape not in self.graphs:
            self.graphs[images.shape] = self._capture(images.clone(), sizes.clone())
        graph, own_images, own_sizes, found = self.graphs[images.shape]
        own_images.copy_(images)
        own_sizes.copy_(sizes)
        graph.replay()
        return found

    def _capture(self, images: Tensor, sizes: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, PaddedDetections]:
        # Weights cast to bfloat16 and cached before the capture would be freed under the graph
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            super()._infer(images, sizes)  # compiles, and allocates what libraries keep
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = super()._infer(images, sizes)
        return graph, images, sizes, found


def torchvisions(preset: str, size: Sequence[int], *, frozen: bool = True) -> nn.Module:
    """The preset as torchvision builds it, on the CPU; `frozen` as its published models are, or trained all over."""
    config = PRESETS[preset].model
    backbone = resnet_fpn_backbone(
        backbone_name=BACKBONES[preset],
        weights=None,
        norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d,
        trainable_layers=3 if frozen else 5,
    )
    kind = detection.MaskRCNN if config.keypoint is None else detection.KeypointRCNN
    # In training, where it is allowed to, torchvision skips the resize that these images do not need either.
    model = kind(backbone, config.classes + 1, min_size=min(size), max_size=max(size), _skip_resize=True)
    image = picture(320, 320) / 255
    calibrate(model, image)
    _sharpen(model.roi_heads.box_predictor.cls_score, lambda: model([image]))
    return model


def ours(theirs: nn.Module) -> MaskRCNN:
    """Ours, on the CPU, with torchvision's weights and conventions."""
    weights = convert_detector(theirs.state_dict())
    config = weights.config
    frozen_stages = config.backbone.frozen_stages if config.backbone.norm == "frozen" else 0
    config = replace(
        config,
        input=replace(config.input, min_size=theirs.transform.min_size[0], max_size=theirs.transform.max_size),
        backbone=replace(config.backbone, norm_eps=1e-5, frozen_stages=frozen_stages),
    )
    model = MaskRCNN(config)
    model.load_state_dict(weights.tensors)
    return model.eval()


def graphed(model: MaskRCNN) -> GraphedMaskRCNN:
    """The model with weights of its own, on the same device."""
    copy = GraphedMaskRCNN(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(model.rpn.cells.device).eval()


def ours_alone(preset: str, size: Sequence[int]) -> MaskRCNN:
    """A C4, which torchvision does not have, with its batch norms folded as frozen ones are."""
    config = PRESETS[preset].model
    config = replace(
        config,
        input=replace(config.input, min_size=min(size), max_size=max(size)),
        backbone=replace(config.backbone, norm="batch", frozen_stages=0),
    )
    model = MaskRCNN(config).train()
    x = functional.normalize(picture(320, 320).float(), config.input.pixel_mean, config.input.pixel_std)
    with torch.no_grad():
        features = _settle(model.backbone, x[None])[-1]
        model.rpn.convs[0].conv.weight /= features.std()
        _settle(model.res5, features)
    model.eval()
    _sharpen(model.box_head.class_logits, lambda: model.detect([picture(320, 320)]))
    return model


@torch.no_grad()
def calibrate(model: nn.Module, image: Tensor) -> None:
    """Give random weights statistics: untrained, features grow from layer to layer until no box is finite.

    Args:
        model: torchvision's.
        image: `[3, H, W]`, 0..1.
    """
    levels = _settle(model.eval().backbone, model.transform.normalize(image)[None])
    for block, level in zip(model.backbone.fpn.layer_blocks, levels.values(), strict=False):  # P6 has no weights
        block[0].weight /= level.std()


@torch.no_grad()
def _sharpen(layer: nn.Linear, run: Call) -> None:
    """Scores like a trained classifier's: above 0.05 are two of a region's classes, or a region in two of one class."""
    found: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: found.append(output))
    run()
    hook.remove()
    scale = 2 / found[0].std()
    logits = found[0] * scale
    regions, classes = len(logits), logits.shape[1] - 1
    low, high = -30.0, 30.0
    for _ in range(20):
        background = (low + high) / 2
        shifted = torch.cat([logits[:, :1] + background, logits[:, 1:]], 1)
        above = (shifted.softmax(1)[:, 1:] > 0.05).sum()
        low, high = (background, high) if above > min(2, classes / 2) * regions else (low, background)
    layer.weight *= scale
    layer.bias *= scale
    layer.bias[0] += background


def _settle(network: nn.Module, x: Tensor) -> Any:
    """What the network makes of x, where each batch norm takes the statistics of its input."""

    def take(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_var.copy_(variance)
        norm.running_mean.copy_(mean)

    hooks = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            hooks.append(module.register_forward_pre_hook(take))
        if hasattr(module, "bn3"):
            module.bn3.weight.fill_(RESIDUAL)
    result = network(x)
    for hook in hooks:
        hook.remove()
    return result


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """`[3, height, width]` uint8, with structure of all sizes."""
    g = generator(seed)
    octaves = [torch.randn(1, 3, height // s + 1, width // s + 1, generator=g) for s in (8, 16, 32, 64, 128)]
    layers = [F.interpolate(octave, size=(height, width), mode="bicubic")[0] for octave in octaves]
    return (128 + 60 * torch.stack(layers).sum(0) / len(layers) ** 0.5).clamp(0, 255).to(torch.uint8)


def detect(model: MaskRCNN, images: Sequence[Tensor]) -> list[Found]:
    """Ours, from images on the host."""
    results = []
    exact = _exact(model) and not isinstance(model, GraphedMaskRCNN)
    for found in model.detect(images):
        assert len(found) == model.config.box.detections
        masks = None if found.mask_probabilities is None else encode_ours(found)
        results.append(_on_host(found.boxes, found.scores, found.labels, masks, found.keypoints, exact))
    return results


@torch.inference_mode()
def detect_torchvisions(model: nn.Module, images: Sequence[Tensor]) -> list[Found]:
    device = next(model.parameters()).device
    exact = _exact(model)
    results = []
    for found in model([functional.to_dtype(image.to(device), scale=True) for image in images]):
        masks = encode_torchvisions(threshold(found["masks"])) if "masks" in found else None
        results.append(_on_host(found["boxes"], found["scores"], found["labels"], masks, found.get("keypoints"), exact))
    return results


def _exact(model: nn.Module) -> bool:
    """Whether it computes in float32: neither under autocast nor, on a GPU, in TF32."""
    kind = next(model.parameters()).device.type
    return not torch.is_autocast_enabled(kind) and (kind == "cpu" or not torch.backends.cudnn.allow_tf32)


def _on_host(
    boxes: Tensor, scores: Tensor, labels: Tensor, masks: Masks | None, keypoints: Tensor | None, exact: bool
) -> Found:
    keypoints = None if keypoints is None else keypoints.cpu()
    return Found(boxes.float().cpu(), scores.float().cpu(), labels.cpu(), masks, keypoints, exact)


def encode_ours(found: Detections) -> Masks:
    return found.masks().cpu() if NO_RLE else encode_masks(found)


def threshold(masks: Tensor) -> Tensor:
    """torchvision's pasted probabilities, `[N, 1, H, W]`, as masks."""
    return masks[:, 0] >= 0.5


def encode_torchvisions(masks: Tensor) -> Masks:
    """One by one, as torchvision's own evaluation does."""
    pixels = masks.cpu()
    if NO_RLE:
        return pixels
    return [coco_mask.encode(np.array(mask, dtype=np.uint8, order="F")) for mask in pixels.numpy()]


def same(ours: object, theirs: object) -> bool:
    """Whether two detectors of the same weights have found the same in each image."""
    return all(_same(a, b, EXACT if a.exact and b.exact else ROUNDED) for a, b in zip(ours, theirs, strict=True))


def _same(a: Found, b: Found, limit: Agreement) -> bool:
    if len(a.boxes) != len(b.boxes):
        return False
    overlap, index = (box_iou(a.boxes, b.boxes) * (a.labels[:, None] == b.labels)).max(1)  # equals may change places
    overlap = overlap[: int(limit.best * len(overlap))]
    rows = (overlap > limit.iou).nonzero()[:, 0]
    index = index[rows]
    agrees = len(rows) >= limit.share * len(overlap)
    agrees &= bool(((a.scores - b.scores).abs() <= limit.score * a.scores).all())
    if a.masks is not None:
        differ = (_pixels(a.masks)[rows] != _pixels(b.masks)[index]).sum((1, 2))
        agrees &= bool((differ <= limit.masks * box_ops.area(a.boxes[rows])).float().mean() >= limit.share)
    if a.keypoints is not None:
        distance = (a.keypoints[rows] - b.keypoints[index]).abs().amax(-1)
        agrees &= bool((distance <= limit.keypoints).float().mean() >= limit.share)
    return agrees


def _pixels(masks: Masks) -> Tensor:
    """`[N, H, W]` bool."""
    return masks if isinstance(masks, Tensor) else torch.from_numpy(coco_mask.decode(masks)).permute(2, 0, 1).bool()
