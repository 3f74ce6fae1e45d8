"""fastmask's operators inside torchvision's two-stage detectors: Faster, Mask and Keypoint R-CNN.

    model = accelerate(torchvision.models.detection.maskrcnn_resnet50_fpn())

Pooling, matching, sampling, the selection of proposals and of detections, mask targets, the mask and the keypoint
loss, keypoint decoding and mask paste-back become fastmask's; weights, hooks and everything else stay. The class of
each module that runs one of them is replaced by a subclass of it, and `restore` puts the original class back.
torchvision itself is not patched, and other models are not touched.

`torch.jit.script` does not compile an accelerated model; it does compile a restored one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import roi_heads, transform
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from fastmask import box_ops, modules
from fastmask.integrations._swap import ClassSwap
from fastmask.kernels.decode_keypoints import decode_keypoints
from fastmask.kernels.keypoint_loss import keypoint_loss
from fastmask.kernels.mask_loss import mask_loss
from fastmask.kernels.mask_targets import mask_targets
from fastmask.kernels.match_boxes import match_boxes
from fastmask.kernels.paste_masks import paste_masks
from fastmask.kernels.sample_matches import sample_matches
from fastmask.kernels.select_detections import select_detections
from fastmask.kernels.select_proposals import select_proposals
from fastmask.masks import Masks

Sizes = list[tuple[int, int]]  # (height, width) of each image, in pixels
Target = dict[str, Tensor]


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
    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The best proposals of all images by one NMS, and losses of which only the sampled anchors are encoded."""
        if not (_has_standard_parts(self) and type(self.anchor_generator) is AnchorGenerator):
            return super().forward(images, features, targets)
        maps = list(features.values())
        logits, deltas = self.head(maps)
        logits = [level.permute(0, 2, 3, 1).flatten(1) for level in logits]
        deltas = [level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas]
        anchors = self.anchor_generator(images, maps)[0]  # the same for all images
        boxes, _, counts = select_proposals(
            [level.detach() for level in logits],
            [level.detach() for level in deltas],
            anchors.split([level.shape[1] for level in logits]),
            _as_tensor(images.image_sizes, anchors.device),
            pre_nms_top_k=self.pre_nms_top_n(),
            post_nms_top_k=self.post_nms_top_n(),
            iou_threshold=self.nms_thresh,
            min_size=self.min_size,
            weights=self.box_coder.weights,
            score_activation="sigmoid",
            score_threshold=self.score_thresh,
        )
        losses = {}
        if self.training:
            if targets is None:
                raise ValueError("targets should not be None")
            losses = self._losses(torch.cat(logits, 1), torch.cat(deltas, 1), anchors, targets)
        return [rows[:count] for rows, count in zip(boxes, counts.tolist(), strict=True)], losses

    def _losses(self, logits: Tensor, deltas: Tensor, anchors: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Both losses from logits `[B, N]` and deltas `[B, N, 4]`, as `compute_loss` has them."""
        gt_boxes, gt_counts = _pad([target["boxes"] for target in targets])
        matches, labels = _match(self.proposal_matcher, anchors, gt_boxes, gt_counts)
        indices, valid = _sample(self.fg_bg_sampler, labels)
        positive = valid & (labels.gather(1, indices) == 1)
        anchors = anchors[indices]
        gt_boxes = gt_boxes.take_along_dim(matches.gather(1, indices)[..., None], 1)
        # Anchors that are not positive are their own targets: without an object, there is no other
        targets_of_deltas = box_ops.encode(
            torch.where(positive[..., None], gt_boxes, anchors), anchors, self.box_coder.weights
        )
        distance = F.smooth_l1_loss(
            deltas.take_along_dim(indices[..., None], 1), targets_of_deltas, beta=1 / 9, reduction="none"
        )
        logits = logits.gather(1, indices)
        objectness = F.binary_cross_entropy_with_logits(logits, positive.to(logits), reduction="none")
        return {
            "loss_objectness": (objectness * valid).sum() / valid.sum(),
            "loss_rpn_box_reg": (distance * positive[..., None]).sum() / valid.sum(),
        }


class _FastRoIHeads(RoIHeads):
    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Sizes, targets: Any = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """torchvision's, with fastmask's functions for masks and keypoints."""
        return _with_functions(RoIHeads.forward, _ROI_HEADS)(self, features, proposals, image_shapes, targets)

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[Target] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Sampled boxes of each image, with the object, the class and the deltas of each."""
        if not _has_standard_parts(self):
            return super().select_training_samples(proposals, targets)
        self.check_targets(targets)
        assert targets is not None
        gt = [target["boxes"].to(proposals[0].dtype) for target in targets]
        gt_boxes, gt_counts = _pad(gt)
        gt_labels, _ = _pad([target["labels"] for target in targets])
        boxes, counts = _pad(self.add_gt_proposals(proposals, gt))
        matches, labels = _match(self.proposal_matcher, boxes, gt_boxes, gt_counts, counts)
        indices, valid = _sample(self.fg_bg_sampler, labels)
        boxes, matches = boxes.take_along_dim(indices[..., None], 1), matches.gather(1, indices)
        positive = labels.gather(1, indices) == 1
        # Boxes that are not positive are their own targets, which the loss ignores
        matched = torch.where(positive[..., None], gt_boxes.take_along_dim(matches[..., None], 1), boxes)
        deltas = box_ops.encode(matched, boxes, self.box_coder.weights)
        columns = (boxes, matches, gt_labels.gather(1, matches) * positive, deltas)
        samples = valid.sum(1).tolist()
        boxes, matches, labels, deltas = (
            [rows[:count] for rows, count in zip(column, samples, strict=True)] for column in columns
        )
        return boxes, matches, labels, deltas

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: Sizes
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Each image's best detections by one NMS over all images, boxes and classes."""
        if not _has_standard_coder(self) or _requires_grad(class_logits, box_regression):
            return super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        per_image = [len(rows) for rows in proposals]
        boxes, counts = _pad(proposals)
        class_logits, box_regression = (
            _pad(rows.split(per_image))[0].flatten(0, 1) for rows in (class_logits, box_regression)
        )
        *results, found = select_detections(
            class_logits,
            box_regression.unflatten(1, (-1, 4)),
            boxes,
            counts,
            _as_tensor(image_shapes, boxes.device),
            score_threshold=self.score_thresh,
            iou_threshold=self.nms_thresh,
            max_detections=self.detections_per_img,
            min_size=1e-2,
            weights=self.box_coder.weights,
        )
        numbers = found.tolist()
        boxes, scores, labels = (
            [rows[:number] for rows, number in zip(column, numbers, strict=True)] for column in results
        )
        return boxes, scores, labels


class _FastTransform(GeneralizedRCNNTransform):
    def postprocess(
        self, result: list[dict[str, Tensor]], image_shapes: Sizes, original_image_sizes: Sizes
    ) -> list[dict[str, Tensor]]:
        """torchvision's, with fastmask's paste-back."""
        function = _with_functions(GeneralizedRCNNTransform.postprocess, _TRANSFORM)
        return function(self, result, image_shapes, original_image_sizes)


def _mask_loss(
    mask_logits: Tensor,
    proposals: list[Tensor],
    gt_masks: list[Tensor],
    gt_labels: list[Tensor],
    mask_matched_idxs: list[Tensor],
) -> Tensor:
    """For `maskrcnn_loss`."""
    if any(masks.dtype not in (torch.uint8, torch.bool) for masks in gt_masks):
        return roi_heads.maskrcnn_loss(mask_logits, proposals, gt_masks, gt_labels, mask_matched_idxs)
    labels = torch.cat([labels[i] for labels, i in zip(gt_labels, mask_matched_idxs, strict=True)])
    objects, matches = 0, []
    for masks, matched in zip(gt_masks, mask_matched_idxs, strict=True):
        matches.append(matched + objects)
        objects += len(masks)
    masks = Masks.batch([Masks.from_bitmaps(masks) for masks in gt_masks])
    targets = mask_targets(masks, torch.cat(proposals), torch.cat(matches), mask_logits.shape[-1])
    return mask_loss(mask_logits, targets, labels + 1)  # torchvision's channel k is class k, with a background


def _mask_probabilities(x: Tensor, labels: list[Tensor]) -> tuple[Tensor, ...]:
    """For `maskrcnn_inference`: the sigmoid of one class's mask instead of all."""
    chosen = torch.cat(labels)
    x = x[torch.arange(len(x), device=x.device), chosen][:, None]
    return x.sigmoid().split([len(rows) for rows in labels])


def _keypoint_loss(
    keypoint_logits: Tensor,
    proposals: list[Tensor],
    gt_keypoints: list[Tensor],
    keypoint_matched_idxs: list[Tensor],
) -> Tensor:
    """For `keypointrcnn_loss`."""
    keypoints = torch.cat([rows[i] for rows, i in zip(gt_keypoints, keypoint_matched_idxs, strict=True)])
    pixels, valid = roi_heads.keypoints_to_heatmap(keypoints, torch.cat(proposals), keypoint_logits.shape[-1])
    return keypoint_loss(keypoint_logits, pixels.masked_fill(valid == 0, -1))


def _keypoints(x: Tensor, boxes: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """For `keypointrcnn_inference`."""
    if _requires_grad(x):
        return roi_heads.keypointrcnn_inference(x, boxes)
    keypoints, scores = decode_keypoints(x, torch.cat(boxes))
    per_image = [len(rows) for rows in boxes]
    return keypoints.split(per_image), scores.split(per_image)


def _paste(masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1) -> Tensor:
    """For `paste_masks_in_image`, which torchvision calls with its default padding."""
    assert padding == 1
    return paste_masks(masks[:, 0], boxes, img_shape, None, convention="torchvision")[:, None]


Functions = Mapping[Callable[..., Any], Callable[..., Any]]
_ROI_HEADS: Functions = {
    roi_heads.maskrcnn_loss: _mask_loss,
    roi_heads.maskrcnn_inference: _mask_probabilities,
    roi_heads.keypointrcnn_loss: _keypoint_loss,
    roi_heads.keypointrcnn_inference: _keypoints,
}
_TRANSFORM: Functions = {transform.paste_masks_in_image: _paste}


def _with_functions(method: Callable[..., Any], functions: Functions) -> Callable[..., Any]:
    """torchvision's `method`, which calls other functions than its module has.

    A function that somebody has replaced in torchvision's module stays theirs.
    """
    assert isinstance(method, FunctionType)
    names = dict(method.__globals__)
    for original, replacement in functions.items():
        if names[original.__name__] is original:
            names[original.__name__] = replacement
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


def _has_standard_parts(module: RegionProposalNetwork | RoIHeads) -> bool:
    """Whether matcher, sampler and box coder are torchvision's: fastmask's operators do what these do."""
    return (
        type(module.proposal_matcher) is Matcher
        and type(module.fg_bg_sampler) is BalancedPositiveNegativeSampler
        and _has_standard_coder(module)
    )


def _has_standard_coder(module: RegionProposalNetwork | RoIHeads) -> bool:
    coder = module.box_coder
    return type(coder) is BoxCoder and coder.bbox_xform_clip == log(1000 / 16)  # fastmask decodes with this limit


def _requires_grad(*tensors: Tensor) -> bool:
    """Whether a gradient is expected of the operators that have none."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _match(
    matcher: Matcher, boxes: Tensor, gt_boxes: Tensor, gt_counts: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return match_boxes(
        boxes,
        gt_boxes,
        gt_counts,
        matcher.high_threshold,
        matcher.low_threshold,
        low_quality=matcher.allow_low_quality_matches,
        counts=counts,
    )


def _sample(sampler: BalancedPositiveNegativeSampler, labels: Tensor) -> tuple[Tensor, Tensor]:
    return sample_matches(labels, sampler.batch_size_per_image, sampler.positive_fraction)


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of each image in one tensor `[B, N, ...]`, N > 0, zeros after them; and their numbers `[B]`."""
    padded = pad_sequence(list(rows), batch_first=True)
    if not padded.shape[1]:
        padded = padded.new_zeros(len(rows), 1, *padded.shape[2:])
    return padded, torch.tensor([len(row) for row in rows], device=padded.device)


def _as_tensor(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.tensor([tuple(size) for size in sizes], device=device)


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
