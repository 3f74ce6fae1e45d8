"""Inputs and outputs of a detector. Boxes are x1, y1, x2, y2 in continuous coordinates: pixel i covers [i, i + 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from fastmask import Masks, encode_rle, paste_masks
from models.marks import mark


@dataclass
class _Tensors:
    """Base class of dataclasses whose tensors are moved and indexed together."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A copy with `Tensor.to` applied to every tensor. A dtype would convert integer labels too."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """A copy with every tensor in page-locked memory."""
        return self._map(lambda value: value.pin_memory())

    def tensors(self) -> list[Tensor]:
        """All tensors, those of masks included."""
        values = [getattr(self, entry.name) for entry in fields(self)]
        values += [
            getattr(masks, entry.name) for masks in values if isinstance(masks, Masks) for entry in fields(masks)
        ]
        return [value for value in values if isinstance(value, Tensor)]

    def _map(self, function: Callable[[Any], Any]) -> Self:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        changed = {name: function(value) for name, value in values.items() if isinstance(value, Tensor | Masks)}
        return type(self)(**values | changed)


@dataclass(frozen=True)
class Category:
    """A class of objects. The skeleton is the pairs of keypoints, counted from 0, to connect in a drawing."""

    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()


@dataclass
class Target(_Tensors):
    """Ground truth of one image, in pixels of the resized image."""

    boxes: Tensor  # [G, 4] float32, without crowd regions
    labels: Tensor  # [G] int64, 1..classes
    crowds: Tensor  # [C, 4] float32: regions of many objects, which are no background
    masks: Masks | None = None  # G, compact
    keypoints: Tensor | None = None  # [G, P, 3] float32: x, y and COCO's visibility, 0 where unlabelled
    image_id: int = 0


@dataclass
class PaddedTargets(_Tensors):
    """Ground truth of a batch in fixed shapes, in pixels of the padded images.

    Image b has `counts[b]` objects and `crowd_counts[b]` crowd regions; boxes, labels and keypoints are zero in the
    slots after them. There is at least one slot of each kind.
    """

    boxes: Tensor  # [B, G, 4] float32
    labels: Tensor  # [B, G] int64
    counts: Tensor  # [B] int64
    crowds: Tensor  # [B, C, 4] float32
    crowd_counts: Tensor  # [B] int64
    masks: Masks | None = None  # of the objects of all images
    keypoints: Tensor | None = None  # [B, G, P, 3] float32
    image_ids: tuple[int, ...] = ()


def pad_targets(targets: Sequence[Target]) -> PaddedTargets:
    """Ground truth of each image as that of a batch.

    Args:
        targets: all with masks, or all without; so for keypoints.
    """
    keypoints = [target.keypoints for target in targets if target.keypoints is not None]
    masks = [target.masks for target in targets if target.masks is not None]
    return PaddedTargets(
        boxes=_padded([target.boxes for target in targets], torch.zeros(0, 4)),
        labels=_padded([target.labels for target in targets], torch.zeros(0, dtype=torch.int64)),
        counts=torch.tensor([len(target.boxes) for target in targets]),
        crowds=_padded([target.crowds for target in targets], torch.zeros(0, 4)),
        crowd_counts=torch.tensor([len(target.crowds) for target in targets]),
        masks=Masks.batch(masks) if masks else None,
        keypoints=_padded(keypoints, keypoints[0]) if keypoints else None,
        image_ids=tuple(target.image_id for target in targets),
    )


def _padded(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """`[B, N, ...]` from `[N_b, ...]` of each image, with at least one slot."""
    slots = max([1, *map(len, values)])
    padded = (values[0] if values else like).new_zeros(len(values), slots, *like.shape[1:])
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
    return padded


class Proposals(NamedTuple):
    """Proposals of a batch in fixed shapes, in pixels of the padded images; zero after the first `counts[b]`."""

    boxes: Tensor  # [B, P, 4] float32, by descending score
    counts: Tensor  # [B] int64

    def compact(self) -> Proposals:
        """Without the slots that no image fills. Synchronises with the device."""
        return self._replace(boxes=self.boxes[:, : int(self.counts.max())])


@dataclass
class PaddedDetections(_Tensors):
    """Detections of a batch in fixed shapes, in pixels of the padded images or, after `rescale`, of the original ones.

    Image b has `counts[b]` detections. Boxes, scores and labels are zero in the slots after them.
    """

    boxes: Tensor  # [B, D, 4] float32
    scores: Tensor  # [B, D], descending
    labels: Tensor  # [B, D] int64, 1..classes
    counts: Tensor  # [B] int64
    masks: Tensor | None = None  # [B, D, m, m], probabilities inside the box
    keypoints: Tensor | None = None  # [B, D, P, 3]: x, y, 1
    keypoint_scores: Tensor | None = None  # [B, D, P], logits

    def compact(self) -> PaddedDetections:
        """Without the slots that no image fills. Synchronises with the device."""
        slots = int(self.counts.max())
        return self._map(lambda tensor: tensor if tensor.ndim == 1 else tensor[:, :slots])

    def rescale(self, factors: Sequence[tuple[float, float]]) -> None:
        """Multiply the coordinates of each image, in place.

        Args:
            factors: (vertical, horizontal) of each image. Numbers of the host, which are not copied to the device.
        """
        points = [self.boxes.unflatten(-1, (2, 2)), *([] if self.keypoints is None else [self.keypoints])]
        for image, (vertical, horizontal) in enumerate(factors):
            for coordinates in points:
                coordinates[image, ..., 0] *= horizontal
                coordinates[image, ..., 1] *= vertical

    def split(
        self, image_sizes: Sequence[tuple[int, int]], paste: Literal["aligned", "torchvision"]
    ) -> list[Detections]:
        """The detections of each image. Synchronises with the device once.

        Args:
            image_sizes: (height, width) of each image whose pixels the coordinates are in.
            paste: see `Detections`.
        """
        return [
            Detections(
                boxes=self.boxes[image, :count],
                scores=self.scores[image, :count],
                labels=self.labels[image, :count],
                image_size=size,
                mask_probabilities=None if self.masks is None else self.masks[image, :count],
                keypoints=None if self.keypoints is None else self.keypoints[image, :count],
                keypoint_scores=None if self.keypoint_scores is None else self.keypoint_scores[image, :count],
                paste=paste,
            )
            for image, (count, size) in enumerate(zip(self.counts.tolist(), image_sizes, strict=True))
        ]


@dataclass
class Detections(_Tensors):
    """Detections of one image by descending score, in pixels of the original image."""

    boxes: Tensor  # [N, 4] float32
    scores: Tensor  # [N]
    labels: Tensor  # [N] int64, 1..classes
    image_size: tuple[int, int]  # height, width
    mask_probabilities: Tensor | None = None  # [N, m, m], inside the box
    keypoints: Tensor | None = None  # [N, P, 3]: x, y, 1
    keypoint_scores: Tensor | None = None  # [N, P], logits
    paste: Literal["aligned", "torchvision"] = "aligned"  # the convention of `fastmask.paste_masks`

    def __len__(self) -> int:
        return len(self.boxes)

    @mark("paste")
    def masks(self, threshold: float = 0.5) -> Tensor:
        """Masks pasted into the image.

        Args:
            threshold: pixels of at least this probability are part of the mask.

        Returns:
            `[N, H, W]` bool. They take N * H * W bytes; for less, paste slices of the detections.

        Raises:
            ValueError: the model has no mask branch.
        """
        return paste_masks(self._mask_probabilities(), self.boxes, self.image_size, threshold, convention=self.paste)

    @mark("RLE")
    def rle(self) -> list[dict[str, Any]]:
        """Masks in COCO's compressed run-length encoding, without pasting them. Synchronises with the device.

        Returns:
            For each detection `{"size": [H, W], "counts": text}`.

        Raises:
            ValueError: the model has no mask branch.
        """
        return encode_rle(self._mask_probabilities(), self.boxes, self.image_size, convention=self.paste)

    def _mask_probabilities(self) -> Tensor:
        if self.mask_probabilities is None:
            raise ValueError("mask_probabilities: expected [N, m, m], got None: the model has no mask branch")
        return self.mask_probabilities

    def __getitem__(self, index: slice | Tensor) -> Detections:
        """The detections that `index` selects."""
        return self._map(lambda tensor: tensor[index])
