"""Proposals of an RPN: the best anchors of each level, decoded, clipped, filtered, and suppressed (Ren et al. 2015).

Of each image and level, the `pre_nms_top_k` anchors with the greatest logits are candidates (Lin et al. 2017). Their
boxes are decoded (`_decode.py`), limited to the image, and dropped where they are too small. Greedy NMS follows within
each level, and the `post_nms_top_k` best of all levels are the proposals of the image.

B images, L levels of A_l anchors, N candidates of a level at most, P proposals. Boxes are `(x1, y1, x2, y2)` in pixels
of the images, continuous.

Order: by falling score; ties by rising level, then in the order of `torch.topk`, which also chooses among equal logits
at the end of a level's candidates. NMS takes the levels one by one on accelerators, and as classes of one list in the
reference. Both keep the same boxes, because boxes of different levels never meet; a level's quota of P cannot drop one
of the P best.

Only candidates are decoded: 4,819 boxes of an 800 x 1344 image and not its 268,569 anchors, which is 0.4 MB read and
written instead of 13. After `torch.topk` there are four launches: `decode_candidates_kernel`, the two of NMS, and
`merge_levels_kernel`; sorting, padding, concatenation and gathering take none. There is no host-device synchronisation.
Deterministic: no atomics, one writer per element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmask.kernels._decode import check_decode_options, check_image_sizes
from fastmask.kernels._runtime import overridable
from fastmask.kernels._validation import (
    MAX_INT32,
    check_choice,
    check_float,
    check_fraction,
    check_int,
    check_same_device,
    check_sequence,
    check_tensor,
)
from fastmask.kernels.select_proposals.op import ProposalSpec, select_proposals_op

ACTIVATIONS = ("none", "sigmoid")
MAX_ANCHORS = 2**30 - 1  # of a level: what `pack_size` holds


def _check_levels(logits: Any, deltas: Any, anchors: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Lists with a tensor for each level, each list of one dtype, all on one device."""
    named = {"logits": logits, "deltas": deltas, "anchors": anchors}
    lists = {name: check_sequence(name, value, "tensors") for name, value in named.items()}
    levels = len(lists["logits"])
    if not levels:
        raise ValueError("logits: expected at least one level, got []")
    for name, tensors in lists.items():
        if len(tensors) != levels:
            raise ValueError(f"{name}: expected {levels} levels to match logits, got {len(tensors)}")
        for tensor in tensors:
            check_tensor(name, tensor, floating=True)
            if tensor.dtype != tensors[0].dtype:
                raise TypeError(f"{name}: expected {tensors[0].dtype} in all levels, got {tensor.dtype}")
            check_same_device(name, tensor, "logits", lists["logits"][0])
    batch = None
    for logit, delta, anchor in zip(*lists.values(), strict=True):
        batch = logit.shape[0] if batch is None and logit.ndim else batch
        if logit.ndim != 2 or logit.shape[0] != batch:
            raise ValueError(f"logits: expected [{'B' if batch is None else batch}, A], got {list(logit.shape)}")
        if logit.shape[1] > MAX_ANCHORS:
            raise ValueError(f"logits: expected at most 2^30 - 1 anchors of a level, got {logit.shape[1]}")
        if delta.shape != (*logit.shape, 4):
            raise ValueError(f"deltas: expected {[*logit.shape, 4]} to match logits, got {list(delta.shape)}")
        if anchor.shape != (logit.shape[1], 4):
            raise ValueError(f"anchors: expected {[logit.shape[1], 4]} to match logits, got {list(anchor.shape)}")
    return lists["logits"], lists["deltas"], lists["anchors"]


@overridable
def select_proposals(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_sizes: Tensor,
    *,
    pre_nms_top_k: int,
    post_nms_top_k: int,
    iou_threshold: float,
    min_size: float | None,
    min_size_inclusive: bool = True,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    score_activation: str = "none",
    score_threshold: float | None = None,
    drop_non_finite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The proposals of a batch from an RPN's outputs, in fixed shapes and without synchronisation.

    torchvision's `RegionProposalNetwork.filter_proposals` is `score_activation="sigmoid"` with its `score_threshold`.
    detectron2's `find_top_rpn_proposals` is `min_size_inclusive=False, drop_non_finite=True`.

    Args:
        logits: `[B, A_l]` of each level, floating: objectness.
        deltas: `[B, A_l, 4]` of each level, floating: `(dx, dy, dw, dh)`, as `fastmask.box_ops.decode` takes them.
        anchors: `[A_l, 4]` of each level, floating, `(x1, y1, x2, y2)` in pixels of the images.
        image_sizes: `[B, 2]`, (height, width) of the images in pixels; boxes are limited to them.
        pre_nms_top_k: the number of candidates of each image and level, those with the greatest logits. NaN counts as
            the greatest, and is dropped after.
        post_nms_top_k: P, the largest number of proposals of an image. B * P < 2^31.
        iou_threshold: in [0, 1]; a box is dropped if its IoU with a better one of its level exceeds this.
        min_size: in pixels; a box whose width or height is smaller, after clipping, is dropped. None drops only boxes
            with a NaN coordinate, which are dropped in any case.
        min_size_inclusive: whether a side of exactly `min_size` is enough.
        weights: factors of dx, dy, dw and dh, as given to `fastmask.box_ops.encode`.
        score_activation: `"none"`: scores are logits. `"sigmoid"`: they are probabilities. The order of candidates
            follows the logits in both.
        score_threshold: candidates with a score below this are dropped; None for no limit. A score of -infinity is
            dropped in any case.
        drop_non_finite: whether a candidate is dropped if its logit, or a coordinate before clipping, is infinite.
            Otherwise an infinite coordinate is clipped.

    Returns:
        boxes: `[B, P, 4]`, by falling score, then zeros.
        scores: `[B, P]`, zeros after the proposals.
        counts: `[B]` int64, the number of proposals.

        Boxes and scores are float32, or float64 where an input is; they have no gradient. Ties are ordered by rising
        level, then as by `torch.topk`.

    Raises:
        ValueError: shapes, numbers of levels or devices do not match, or a number is outside its range.
        TypeError: an argument has another type, or a tensor another dtype, than listed here; tensors of a list have
            several dtypes.

    Source: Ren et al. 2015, Faster R-CNN, §3.3; Lin et al. 2017, Feature Pyramid Networks, §4.1.
    """
    logits, deltas, anchors = _check_levels(logits, deltas, anchors)
    batch = logits[0].shape[0]
    check_tensor("image_sizes", image_sizes, real=True)
    check_image_sizes(image_sizes, batch)
    check_same_device("image_sizes", image_sizes, "logits", logits[0])
    top_k = check_int("pre_nms_top_k", pre_nms_top_k, least=0)
    size = check_int("post_nms_top_k", post_nms_top_k, least=0)
    if batch * size > MAX_INT32:
        raise ValueError(f"post_nms_top_k: expected fewer than 2^31 proposals of {batch} images, got {size}")
    spec = ProposalSpec(
        pre_nms_top_k=top_k,
        post_nms_top_k=size,
        iou_threshold=check_fraction("iou_threshold", iou_threshold),
        score_activation=check_choice("score_activation", score_activation, ACTIVATIONS),
        score_threshold=None if score_threshold is None else check_float("score_threshold", score_threshold),
        **check_decode_options(weights, min_size, min_size_inclusive, drop_non_finite),
    )
    detached = ([tensor.detach() for tensor in tensors] for tensors in (logits, deltas, anchors))
    return select_proposals_op(*detached, image_sizes.detach(), *spec)
