"""Augmentation: random flips and sizes of an image and its target.

Boxes and keypoints are in continuous coordinates, where pixel i covers [i, i + 1]: a flip turns x into W - x, and a
resize multiplies x by the ratio of the widths. The pixels of images move in the same way; masks stay compact, and are
not rasterised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from models import preprocess
from models.structures import Target


@dataclass(frozen=True)
class Augmentation:
    """A random horizontal flip (Fast R-CNN), and a random size (appendix B)."""

    min_sizes: tuple[int, ...]  # one is drawn as the length of the shorter side, in pixels
    max_size: int  # largest length of the longer side, in pixels
    flip_probability: float
    mirrored: tuple[int, ...] = ()  # from `mirrored_keypoints`

    def __call__(self, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
        """Flip and resize an image and its target at random.

        Args:
            image: uint8, `[3, H, W]`.
            target: of the image.
            seed: determines the result; the global generator is not used.

        Returns:
            The image, uint8 `[3, h, w]`, and its target.
        """
        generator = torch.Generator().manual_seed(seed)
        if torch.rand((), generator=generator) < self.flip_probability:
            image, target = flip(image, target, self.mirrored)
        choice = int(torch.randint(len(self.min_sizes), (), generator=generator))
        return resize(image, target, self.min_sizes[choice], self.max_size)


def mirrored_keypoints(names: Sequence[str]) -> tuple[int, ...]:
    """The permutation of keypoints in a horizontal flip: `left_eye` becomes `right_eye`, `nose` stays.

    Args:
        names: of the keypoints.

    Returns:
        For each keypoint, the index of its mirror image.

    Raises:
        ValueError: a left keypoint has no right one, or the reverse.
    """
    mirrored = [_other_side(name) for name in names]
    if missing := sorted(set(mirrored) - set(names)):
        raise ValueError(f"names: expected each left_ with its right_, got none of {missing}")
    return tuple(names.index(name) for name in mirrored)


def flip(image: Tensor, target: Target, mirrored: Sequence[int] = ()) -> tuple[Tensor, Target]:
    """Flip an image and its target horizontally.

    Args:
        image: `[3, H, W]`.
        target: of the image.
        mirrored: from `mirrored_keypoints`; needed if the target has keypoints.

    Returns:
        Flipped copies of both.
    """
    width = image.shape[2]
    keypoints = target.keypoints
    if keypoints is not None:
        keypoints = keypoints[:, list(mirrored)]
        x, y, visibility = keypoints.unbind(2)
        keypoints = torch.stack([torch.where(visibility > 0, width - x, x), y, visibility], 2)
    return functional.horizontal_flip(image), replace(
        target,
        boxes=_flip_boxes(target.boxes, width),
        crowds=_flip_boxes(target.crowds, width),
        masks=None if target.masks is None else target.masks.flip(),
        keypoints=keypoints,
    )


def resize(image: Tensor, target: Target, min_size: int, max_size: int) -> tuple[Tensor, Target]:
    """Resize an image and its target as `models.preprocess.resize` does.

    Args:
        image: `[3, H, W]`.
        target: of the image.
        min_size, max_size: as for `fastmask.resized_shape`.

    Returns:
        Resized copies of both.
    """
    height, width = image.shape[1:]
    image = preprocess.resize(image, min_size, max_size)
    shape = (image.shape[1], image.shape[2])
    scales = (shape[1] / width, shape[0] / height)
    box_scales = torch.tensor(2 * scales)
    return image, replace(
        target,
        boxes=target.boxes * box_scales,
        crowds=target.crowds * box_scales,
        masks=None if target.masks is None else target.masks.resize(shape),
        keypoints=None if target.keypoints is None else target.keypoints * torch.tensor([*scales, 1]),
    )


def _other_side(name: str) -> str:
    """The name of the mirrored keypoint."""
    for side, other in (("left_", "right_"), ("right_", "left_")):
        if name.startswith(side):
            return other + name.removeprefix(side)
    return name


def _flip_boxes(boxes: Tensor, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)
