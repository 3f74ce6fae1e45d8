"""Inputs and outputs of a detector. Boxes are x1, y1, x2, y2 in continuous coordinates: pixel i covers [i, i + 1]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Self

from torch import Tensor

from fastmask import paste_masks
from models.marks import mark


@dataclass
class _Tensors:
    """Base class of dataclasses whose tensors are moved and indexed together."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A copy with `Tensor.to` applied to every tensor. A dtype would convert integer labels too."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """A copy with every tensor in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return type(self)(**{n: function(v) if isinstance(v, Tensor) else v for n, v in values.items()})


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
    masks: Tensor | None = None  # [G, H, W] uint8, 0 or 1
    keypoints: Tensor | None = None  # [G, P, 3] float32: x, y and COCO's visibility, 0 where unlabelled
    image_id: int = 0


class Proposals(NamedTuple):
    """Proposals of a batch in fixed shapes, in pixels of the padded images; zero after the first `counts[b]`."""

    boxes: Tensor  # [B, P, 4] float32, by descending score
    counts: Tensor  # [B] int64

    def compact(self) -> Proposals:
        """Without the slots that no image fills. Synchronises with the device."""
        return self._replace(boxes=self.boxes[:, : int(self.counts.max())])


@dataclass
class PaddedDetections(_Tensors):
    """Detections of a batch in fixed shapes, in pixels of the padded images.

    Image b has `counts[b]` detections. Boxes, scores and labels are zero in the slots after them.
    """

    boxes: Tensor  # [B, D, 4] float32
    scores: Tensor  # [B, D], descending
    labels: Tensor  # [B, D] int64, 1..classes
    counts: Tensor  # [B] int64
    masks: Tensor | None = None  # [B, D, m, m], probabilities inside the box
    heatmaps: Tensor | None = None  # [B, D, P, h, h], logits inside the box

    def compact(self) -> PaddedDetections:
        """Without the slots that no image fills. Synchronises with the device."""
        slots = int(self.counts.max())
        return self._map(lambda tensor: tensor if tensor.ndim == 1 else tensor[:, :slots])


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
        if self.mask_probabilities is None:
            raise ValueError("mask_probabilities: expected [N, m, m], got None: the model has no mask branch")
        return paste_masks(self.mask_probabilities, self.boxes, self.image_size, threshold, convention=self.paste)

    def __getitem__(self, index: slice | Tensor) -> Detections:
        """The detections that `index` selects."""
        return self._map(lambda tensor: tensor[index])
