"""Augmentation: a picture and its target resized and mirrored, in continuous coordinates.

With pixel i covering i..i+1, a mirrored x is W - x and a resized one is multiplied, for boxes and keypoints alike,
and the pixels of images and masks go along exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from models import preprocess as images
from models.structures import Target


@dataclass(frozen=True)
class Augmentation:
    """A random horizontal flip (Fast R-CNN), and a random size (appendix B)."""

    min_sizes: tuple[int, ...]  # the shorter edge is one of these
    max_size: int  # the longer edge at most
    flip_probability: float
    mirrored: tuple[int, ...] = ()  # from `mirrored_keypoints`

    def __call__(self, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
        """Augment a uint8 image `[3, H, W]`: the same seed draws the same, whatever was drawn before."""
        generator = torch.Generator().manual_seed(seed)
        if torch.rand((), generator=generator) < self.flip_probability:
            image, target = flip(image, target, self.mirrored)
        choice = int(torch.randint(len(self.min_sizes), (), generator=generator))
        return resize(image, target, self.min_sizes[choice], self.max_size)


def mirrored_keypoints(names: Sequence[str]) -> tuple[int, ...]:
    """For each keypoint the one that a mirror turns it into: `left_eye` is `right_eye`, `nose` stays.

    Raises:
        ValueError: a left one has no right one, or the reverse.
    """
    mirrored = [_other_side(name) for name in names]
    if alone := sorted(set(mirrored) - set(names)):
        raise ValueError(f"names: expected each left_ with its right_, got none of {alone}")
    return tuple(names.index(name) for name in mirrored)


def flip(image: Tensor, target: Target, mirrored: Sequence[int] = ()) -> tuple[Tensor, Target]:
    """Mirror left and right.

    Args:
        image: `[3, H, W]`.
        target: of the image.
        mirrored: from `mirrored_keypoints`, where the target has keypoints.
    """
    width = image.shape[2]
    masks, keypoints = target.masks, target.keypoints
    if keypoints is not None:
        keypoints = keypoints[:, list(mirrored)]
        x, y, visibility = keypoints.unbind(2)
        keypoints = torch.stack([torch.where(visibility > 0, width - x, x), y, visibility], 2)
    return functional.horizontal_flip(image), replace(
        target,
        boxes=_flip_boxes(target.boxes, width),
        crowds=_flip_boxes(target.crowds, width),
        masks=None if masks is None else functional.horizontal_flip(masks),
        keypoints=keypoints,
    )


def resize(image: Tensor, target: Target, min_size: int, max_size: int) -> tuple[Tensor, Target]:
    """Resize as the detector resizes pictures: the shorter side to `min_size`, the longer to at most `max_size`."""
    height, width = image.shape[1:]
    image = images.resize(image, min_size, max_size)
    shape = image.shape[1:]
    x, y = shape[1] / width, shape[0] / height
    masks = target.masks
    if masks is not None:
        masks = functional.resize(
            masks, list(shape), InterpolationMode.NEAREST_EXACT
        )  # plain NEAREST moves by half a pixel
    return image, replace(
        target,
        boxes=target.boxes * torch.tensor([x, y, x, y]),
        crowds=target.crowds * torch.tensor([x, y, x, y]),
        masks=masks,
        keypoints=None if target.keypoints is None else target.keypoints * torch.tensor([x, y, 1]),
    )


def _other_side(name: str) -> str:
    for side, other in (("left_", "right_"), ("right_", "left_")):
        if name.startswith(side):
            return other + name.removeprefix(side)
    return name


def _flip_boxes(boxes: Tensor, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)
