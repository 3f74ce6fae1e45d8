"""fastmask's operators inside torchvision's two-stage detectors: Faster, Mask and Keypoint R-CNN.

    model = accelerate(torchvision.models.detection.maskrcnn_resnet50_fpn())

Pooling, NMS and mask paste-back become fastmask's; weights, hooks and everything else stay. The class of each module
that runs one of them is replaced by a subclass of it, and `restore` puts the original class back. torchvision itself
is not patched, and other models are not touched.

`torch.jit.script` does not compile an accelerated model; it does compile a restored one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from fastmask import box_ops, modules
from fastmask.integrations._swap import ClassSwap
from fastmask.kernels.nms import nms_padded
from fastmask.kernels.paste_masks import paste_masks


class _FastPooler(modules.MultiScaleRoIAlign, MultiScaleRoIAlign):
    """fastmask's forward on torchvision's attributes, and defaults for those that torchvision lacks."""

    aligned, reduction, level_rounding = False, "mean", "torchvision"

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Boxes receive no gradient, as from torchvision's operator.

        The mask and keypoint branches pool from decoded boxes, which require grad where a detector is differentiated in
        evaluation mode.
        """
        return super().forward(x, [box.detach() for box in boxes], image_shapes)


class _FastRegionProposalNetwork(RegionProposalNetwork):
    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The best proposals of all images by one NMS, in which pyramid levels are classes."""
        objectness = objectness.detach().reshape(proposals.shape[0], -1)
        top = self._get_top_n_idx(objectness, num_anchors_per_level)
        level = torch.cat([top.new_full((n,), i) for i, n in enumerate(num_anchors_per_level)])
        scores = objectness.gather(1, top).sigmoid()
        boxes = proposals.gather(1, top[..., None].expand(-1, -1, 4))
        boxes = torch.stack([box_ops.clip(b, size) for b, size in zip(boxes, image_shapes, strict=True)])
        is_large = ((boxes[..., 2:] - boxes[..., :2]) >= self.min_size).all(-1)
        indices, count = nms_padded(
            boxes,
            scores.masked_fill(~is_large | (scores < self.score_thresh), -torch.inf),
            self.nms_thresh,
            self.post_nms_top_n(),
            classes=level[top],
            score_threshold=-torch.inf,
        )
        kept = [row[:n] for row, n in zip(indices, count.tolist(), strict=True)]
        return (
            [b[i] for b, i in zip(boxes, kept, strict=True)],
            [s[i] for s, i in zip(scores, kept, strict=True)],
        )


class _FastRoIHeads(RoIHeads):
    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Each image's best detections by one NMS over all its boxes and classes."""
        per_image = [len(boxes) for boxes in proposals]
        decoded = self.box_coder.decode(box_regression, proposals)
        decoded = decoded.reshape(*class_logits.shape, 4).split(per_image)  # without boxes, decoded is not [0, C, 4]
        scores = softmax(class_logits, -1).split(per_image)
        candidates = []
        for boxes, score, size in zip(decoded, scores, image_shapes, strict=True):
            boxes, score = box_ops.clip(boxes[:, 1:], size), score[:, 1:]  # 0 is the background
            labels = torch.arange(1, score.shape[1] + 1, device=score.device).expand_as(score).flatten()
            boxes, score = boxes.flatten(0, 1), score.flatten()
            is_large = ((boxes[:, 2:] - boxes[:, :2]) >= 1e-2).all(-1)
            indices, count = nms_padded(
                boxes[None],
                score.masked_fill(~is_large, -torch.inf)[None],
                self.nms_thresh,
                self.detections_per_img,
                classes=labels[None],
                score_threshold=self.score_thresh,
            )
            candidates.append((boxes, score, labels, indices[0], count))
        counts = torch.cat([count for *_, count in candidates]).tolist()
        kept = [
            (boxes[i[:n]], score[i[:n]], labels[i[:n]])
            for (boxes, score, labels, i, _), n in zip(candidates, counts, strict=True)
        ]
        boxes, score, labels = (list(column) for column in zip(*kept, strict=True))
        return boxes, score, labels


class _FastTransform(GeneralizedRCNNTransform):
    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        if self.training:
            return super().postprocess(result, image_shapes, original_image_sizes)
        masks = [detections.pop("masks", None) for detections in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for detections, mask, size in zip(result, masks, original_image_sizes, strict=False):
            if mask is not None:
                pasted = paste_masks(mask[:, 0], detections["boxes"], size, None, convention="torchvision")
                detections["masks"] = pasted[:, None]
        return result


_SWAP = ClassSwap(
    {
        MultiScaleRoIAlign: _FastPooler,
        RegionProposalNetwork: _FastRegionProposalNetwork,
        RoIHeads: _FastRoIHeads,
        GeneralizedRCNNTransform: _FastTransform,
    }
)


def accelerate(model: nn.Module) -> nn.Module:
    """Make a torchvision two-stage detector pool, suppress and paste with fastmask, in place.

    Args:
        model: Faster, Mask or Keypoint R-CNN, or any other `GeneralizedRCNN`. A part that has been replaced by
            a class of the user's own keeps it.

    Returns:
        `model`, which gives the same detections. `restore(model)` undoes it.

    Raises:
        TypeError: `model` is not a torchvision two-stage detector.
    """
    _SWAP.apply(_check_detector(model))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place.

    Args:
        model: a torchvision two-stage detector, accelerated or not; copies of an accelerated one count as such.

    Returns:
        `model`, with the classes that torchvision gave it.

    Raises:
        TypeError: `model` is not a torchvision two-stage detector.
    """
    _SWAP.restore(_check_detector(model))
    return model


def _check_detector(model: nn.Module) -> nn.Module:
    if not isinstance(model, GeneralizedRCNN):
        raise TypeError(f"model: expected a torchvision two-stage detector, got {type(model).__name__}")
    return model
