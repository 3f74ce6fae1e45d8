"""Inputs of the operators: the feature maps of an image, and boxes and scores as detectors see them.

The model of boxes: 41% of COCO's objects are smaller than 32^2 pixels, 34% are between that and 96^2, and 24% are
larger (cocodataset.org, "Detection Evaluation"). A log-normal side fits these numbers, doubled because images of
640 x 480 are enlarged to the paper's 800 x 1333. Aspect ratios are log-normal about 1, places uniform. `candidates` are
inputs of NMS: most boxes are jittered copies of thirty objects, the others lie anywhere; most scores are low, as those
of a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

IMAGE = (800, 1344)  # §3.1, padded to a multiple of 32
STRIDES = (4, 8, 16, 32)  # P2 to P5
CHANNELS = 256
CLASSES = 80  # of COCO

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Map(NamedTuple):
    """The feature map of a backbone without a pyramid, over `IMAGE`."""

    stride: int
    channels: int


C4 = Map(stride=16, channels=1024)  # the fourth stage of a ResNet-50 or deeper

# ln(side) is normal. In a 640 x 480 image its quantiles 0.41 and 0.76 are ln(32) and ln(96); images are then enlarged.
_LOG_SIDE_STD = math.log(96 / 32) / (0.7063 + 0.2275)
_LOG_SIDE_MEAN = math.log(32) + 0.2275 * _LOG_SIDE_STD + math.log(1333 / 640)
_LOG_ASPECT_STD = 0.5


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def pyramid(
    device: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    *,
    images: int = 1,
    image: tuple[int, int] = IMAGE,
) -> list[Tensor]:
    """P2 to P5 with `CHANNELS` channels, of random values."""
    g = generator(device=device)
    shapes = [(images, CHANNELS, image[0] // stride, image[1] // stride) for stride in STRIDES]
    return [_random(shape, g, dtype, layout) for shape in shapes]


def c4_map(device: str, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """`[1, 1024, 50, 84]` random values."""
    shape = (1, C4.channels, IMAGE[0] // C4.stride, IMAGE[1] // C4.stride)
    return _random(shape, generator(device=device), dtype, layout)


def _random(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(shape, generator=g, device=g.device).to(dtype, memory_format=layout)


def covered(boxes: Sequence[Tensor], shapes: Sequence[tuple[int, int]], strides: Sequence[int]) -> int:
    """The number of pixels of the feature maps that some box covers, each box on its level (Lin et al. 2017, eq. 1).

    Args:
        boxes: `[K, 4]` for each image.
        shapes: (height, width) of each level.
        strides: the stride of each level.
    """
    total = 0
    for box in boxes:
        level = (4 + torch.log2((box[:, 2:] - box[:, :2]).prod(1).sqrt() / 224)).floor()
        level = level.clamp(math.log2(strides[0]), math.log2(strides[-1]))
        for (height, width), stride in zip(shapes, strides, strict=True):
            on_level = box[level == math.log2(stride)] / stride
            limit = on_level.new_tensor([width, height])
            x1, y1 = on_level[:, :2].floor().minimum(limit - 1).clamp(min=0).long().unbind(1)
            x2, y2 = (on_level[:, 2:].floor() + 2).minimum(limit).long().unbind(1)  # with the last sample's neighbour
            corners = on_level.new_zeros(height + 1, width + 1)
            for y, x, sign in ((y1, x1, 1.0), (y2, x2, 1.0), (y1, x2, -1.0), (y2, x1, -1.0)):
                corners.index_put_((y, x), on_level.new_tensor(sign), accumulate=True)
            total += int((corners.cumsum(0).cumsum(1) > 0.5).sum())
    return total


def objects(count: int, *, image: Sequence[int] = IMAGE, seed: int = 0) -> Tensor:
    """`[count, 4]` boxes of COCO's sizes, inside an image of (height, width)."""
    g = generator(seed)
    log_side = torch.randn(count, 1, generator=g) * _LOG_SIDE_STD + _LOG_SIDE_MEAN
    half_log_aspect = torch.randn(count, 1, generator=g) * _LOG_ASPECT_STD / 2
    limit = torch.tensor([image[1], image[0]])
    size = torch.cat([log_side + half_log_aspect, log_side - half_log_aspect], 1).exp().minimum(limit)
    corner = torch.rand(count, 2, generator=g) * (limit - size)
    return torch.cat([corner, corner + size], 1)


def candidates(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`[count, 4]` boxes, three quarters of them near one of thirty objects, and `[count]` scores."""
    g = generator(seed)
    boxes = objects(count, seed=seed)
    crowd = count * 3 // 4
    centre = objects(30, seed=seed + 1)[torch.randint(30, (crowd,), generator=g)]
    side = (centre[:, 2:] - centre[:, :2]).repeat(1, 2)
    boxes[:crowd] = centre + torch.randn(crowd, 4, generator=g) * 0.15 * side
    low, high = boxes.unflatten(1, (2, 2)).sort(1).values.unbind(1)
    limit = torch.tensor([IMAGE[1], IMAGE[0]])
    boxes = torch.cat([low.clamp(min=0), high.minimum(limit)], 1)
    scores = (torch.randn(count, generator=g) * 2 - 2).sigmoid()
    order = torch.randperm(count, generator=g)
    return boxes[order], scores


def detections() -> tuple[Tensor, Tensor, Tensor]:
    """Boxes `[N, 4]`, scores and classes `[N]` of 1000 proposals in each class, before NMS."""
    proposals, _ = candidates(1000)
    noise = torch.randn(1000 * CLASSES, 4, generator=generator(2)) * 2
    boxes = (proposals.repeat_interleave(CLASSES, 0) + noise).clamp(min=0)
    boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
    logits = torch.randn(1000, CLASSES, generator=generator(3)) * 2
    return boxes, logits.softmax(1).flatten(), torch.arange(CLASSES).repeat(1000)


def one_spot(count: int) -> Tensor:
    """Copies of one box."""
    return torch.tensor([[500.0, 300.0, 620.0, 450.0]]).repeat(count, 1)


def sized(count: int, side: float) -> Tensor:
    """Squares of one size, anywhere in the image."""
    corner = torch.rand(count, 2, generator=generator()) * (torch.tensor([IMAGE[1], IMAGE[0]]) - side)
    return torch.cat([corner, corner + side], 1)


def disjoint(count: int) -> Tensor:
    """Squares on a grid that do not touch each other."""
    across = math.ceil(math.sqrt(count))
    index = torch.arange(count)
    corner = torch.stack([index % across, index // across], 1) * 10.0
    return torch.cat([corner, corner + 8.0], 1)[torch.randperm(count, generator=generator())]


ADVERSARIAL: dict[str, Callable[[int], Tensor]] = {
    "all on one spot": one_spot,
    "all of 2 pixels": partial(sized, side=2),
    "all of 790 pixels": partial(sized, side=790),
}
