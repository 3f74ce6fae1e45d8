"""Time whole detectors against torchvision's, from the same weights, side by side in one run.

    python -m benchmarks.detectors [--device cuda] [--threads 2] [--repeat 7] [--json PATH]

Training: a ResNet-18-FPN from scratch, four images of 192 x 192 with six objects each, torchvision's settings (512
regions an image). Inference: a ResNet-50-FPN on one image of 800 x 1333 with 1000 proposals and 100 detections.
Weights are random; batch norms and the pyramid's maps are scaled so that there is something to detect.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou

from benchmarks.operators import Case, compare, parser
from models import images as pictures
from models.mask_rcnn import MaskRCNN
from models.structures import Target
from models.weights_torchvision import convert_detector


def ours(theirs: nn.Module, device: str, **box: float) -> MaskRCNN:
    """Our detector with torchvision's weights and conventions."""
    weights = convert_detector(theirs.state_dict())
    model = MaskRCNN(replace(weights.config, box=replace(weights.config.box, **box)))
    model.load_state_dict(weights.tensors)
    return model.to(device)


def training_case(device: str, generator: torch.Generator) -> Case:
    size, classes = 192, 7
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    theirs = detection.MaskRCNN(backbone, classes + 1, min_size=size, max_size=size).to(device).train()
    model = ours(theirs, device)
    model.requires_grad_(True)  # as torchvision's, down to the stem
    model.backbone.frozen.clear()
    model.train()
    images = [torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8) for _ in range(4)]
    targets = []
    for _ in images:
        low = torch.rand(6, 2, generator=generator) * 110
        boxes = torch.cat([low, low + 15 + 65 * torch.rand(6, 2, generator=generator)], 1)
        masks = torch.zeros(6, size, size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(1, classes + 1, (6,), generator=generator)
        targets.append(Target(boxes, labels, torch.zeros(0, 4), masks).to(device))
    images = [image.to(device) for image in images]
    floats = [image / 255 for image in images]
    dictionaries = [{"boxes": t.boxes, "labels": t.labels, "masks": t.masks} for t in targets]

    def step(network: nn.Module, *batch: object) -> Tensor:
        network.zero_grad()
        loss = sum(network(*batch).values())
        loss.backward()
        return loss.detach()

    return Case(
        "training step, ResNet-18-FPN, 4 images of 192 x 192",
        lambda: step(model, *pictures.batch(images, model.config.input), targets),
        lambda: step(theirs, floats, dictionaries),
        1 / 0.8,
        lambda a, b: bool((a - b).abs() < 0.1 * b),  # each draws its own samples
    )


def inference_case(device: str, generator: torch.Generator) -> Case:
    size = (800, 1333)
    theirs = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, box_score_thresh=0.0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    calibrate(theirs, image / 255)
    theirs.to(device).eval()
    model = ours(theirs, device, score_threshold=0.0).eval()
    image = image.to(device)

    @torch.inference_mode()
    def detect() -> tuple[Tensor, Tensor, Tensor]:
        (found,) = theirs([image / 255])
        return found["boxes"], found["scores"], found["masks"][:, 0] >= 0.5

    def our_detect() -> tuple[Tensor, Tensor, Tensor]:
        (found,) = model.detect([image])
        return found.boxes, found.scores, found.masks()

    def same(a: object, b: object) -> bool:
        (boxes, scores, masks), (other_boxes, other_scores, other_masks) = a, b
        overlap, index = box_iou(boxes, other_boxes).max(1)  # equal scores may change places
        return (
            len(boxes) == len(other_boxes) == 100
            and bool((overlap > 0.999).all())
            and bool((scores - other_scores).abs().max() < 1e-4)
            and bool((masks != other_masks[index]).double().mean() < 1e-4)
        )

    return Case("inference, ResNet-50-FPN, 800 x 1333, masks pasted", our_detect, detect, 1 / 0.75, same)


@torch.no_grad()
def calibrate(model: nn.Module, image: Tensor) -> None:
    """Give random weights statistics: untrained, features grow from layer to layer until no box is finite."""
    images = model.transform([image])[0].tensors
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train().backbone(images)
    levels = model.eval().backbone(images)
    for block, level in zip(model.backbone.fpn.layer_blocks, levels.values(), strict=False):
        block[0].weight /= level.std()


def main() -> None:
    arguments = parser("Whole detectors against torchvision's, in one run.").parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    compare([make(arguments.device, generator) for make in (training_case, inference_case)], arguments)


if __name__ == "__main__":
    main()
