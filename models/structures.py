"""What goes into a detector and what comes out. Boxes are `(x1, y1, x2, y2)`, continuous pixels, x2, y2 exclusive."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from fastmask import paste_masks


class _Tensors:
    """A dataclass whose tensors move together."""

    def to(self, *args, **kwargs):
        """A copy with `Tensor.to(*args, **kwargs)` of every tensor: move, not convert, or labels turn into floats."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self):
        return self._map(Tensor.pin_memory)

    def _map(self, function):
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return type(self)(**{n: function(v) if isinstance(v, Tensor) else v for n, v in values.items()})


@dataclass(frozen=True)
class Category:
    """A class of a data set, with its keypoints' names and the pairs of them (from 0) that a skeleton joins."""

    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()


@dataclass
class Target(_Tensors):
    """One image's ground truth, in pixels of the image as the network sees it."""

    boxes: Tensor  # [G, 4] float32, without crowds
    labels: Tensor  # [G] int64, 1..classes
    crowds: Tensor  # [C, 4] float32: regions of many objects, where nothing is known to be background
    masks: Tensor | None = None  # [G, H, W] uint8, 0 or 1
    keypoints: Tensor | None = None  # [G, P, 3] float32: x, y, and COCO's visibility, 0 where unlabelled
    image_id: int = 0


@dataclass
class PaddedDetections(_Tensors):
    """A batch's detections in fixed shapes: image b has `counts[b]`, then zeros. Pixels of the padded images."""

    boxes: Tensor  # [B, D, 4] float32
    scores: Tensor  # [B, D], falling
    labels: Tensor  # [B, D] int64, 1..classes; 0 is padding
    counts: Tensor  # [B] int64
    masks: Tensor | None = None  # [B, D, m, m], probabilities inside the box
    heatmaps: Tensor | None = None  # [B, D, P, h, h], logits inside the box

    def first(self, slots: int) -> PaddedDetections:
        """The first `slots` of each image."""
        counts = self.counts.clamp(max=slots)
        return replace(self._map(lambda tensor: tensor if tensor.ndim == 1 else tensor[:, :slots]), counts=counts)


@dataclass
class Detections(_Tensors):
    """One image's detections, best first, in pixels of the image as it was given."""

    boxes: Tensor  # [N, 4] float32
    scores: Tensor  # [N]
    labels: Tensor  # [N] int64, 1..classes
    image_size: tuple[int, int]  # height, width
    mask_probabilities: Tensor | None = None  # [N, m, m], inside the box
    keypoints: Tensor | None = None  # [N, P, 3]: x, y, 1
    keypoint_scores: Tensor | None = None  # [N, P], logits
    paste: str = "aligned"  # the convention of `fastmask.paste_masks`

    def __len__(self) -> int:
        return len(self.boxes)

    def masks(self, threshold: float = 0.5) -> Tensor:
        """Masks pasted into the image, `[N, H, W]` bool: N * H * W bytes. Slices of detections take less."""
        if self.mask_probabilities is None:
            raise ValueError("mask_probabilities: expected [N, m, m], got None: the model has no mask branch")
        return paste_masks(self.mask_probabilities, self.boxes, self.image_size, threshold, convention=self.paste)

    def __getitem__(self, index: slice | Tensor) -> Detections:
        """The detections that `index` selects."""
        return self._map(lambda tensor: tensor[index])
