"""Greedy non-maximum suppression in plain torch: the reference, and what runs on the CPU.

Boxes are sorted by score and processed `BLOCK` at a time. Inside a block the greedy result is the only fixed
point of "a box stays unless an earlier box that stays suppresses it"; iterating finds it in as many steps as the
longest chain of suppressions has links. The boxes that stay are then compared with all later boxes in one
vectorised pass, which drops those that they suppress. Boxes of different groups (classes, segments) are never
compared; small groups are padded and solved many at a time.

Equal to torchvision's CPU operator bit for bit: the same operations on the same floats in the same order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._runtime import compute_dtype

if TYPE_CHECKING:
    from fastmask.kernels.nms.op import NMSSpec

BLOCK = 256  # with TILE: the fastest of {96, 128, 192, 256, 384} x {512, 1024, 2048} for 1000 and for 10,000 boxes
TILE = 2048  # later boxes per pass, so that the pass's intermediates stay in cache; at least BLOCK
SMALL = 512  # a group of up to this many boxes is solved with all its pairs at once: some waste, few operations


@lru_cache(maxsize=64)
def round_down_float32(value: float) -> float:
    """The largest float32 <= value: a float32 exceeds it iff it exceeds the float64 `value`."""
    nearest = torch.tensor(value, dtype=torch.float32, device="cpu")
    return (nearest.nextafter(nearest.new_tensor(-torch.inf)) if nearest.item() > value else nearest).item()


def valid_mask(scores: Tensor, counts: Tensor | None, score_threshold: float | None) -> Tensor | None:
    """Which boxes of `scores[B, N]` take part, boolean `[B, N]`; None if all do."""
    valid = None
    if score_threshold is not None:
        valid = scores > score_threshold
    if counts is not None:
        inside = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
        valid = inside if valid is None else valid & inside
    return valid


def _suppresses(first: Tensor, second: Tensor, threshold: float, scratch: Tensor) -> Tensor:
    """1.0 where IoU > threshold, `[..., K, T]`, from corners and area `[5, ..., K]` and `[5, ..., T]`.

    Allocates nothing: fresh memory for each intermediate would cost more than the arithmetic.
    """
    shape = (*first.shape[1:], second.shape[-1])
    pairs = first[0].numel() * second.shape[-1]
    low = scratch[: 2 * pairs].view(2, *shape)
    high = scratch[2 * pairs : 4 * pairs].view(2, *shape)
    intersection = scratch[4 * pairs : 5 * pairs].view(shape)
    first, second = first[..., None], second[..., None, :]
    torch.maximum(first[:2], second[:2], out=low)
    sides = torch.minimum(first[2:4], second[2:4], out=high).sub_(low).clamp_(min=0)
    torch.mul(sides[0], sides[1], out=intersection)
    union = torch.add(first[4], second[4], out=low[0]).sub_(intersection)
    return torch.gt(intersection.div_(union), threshold, out=intersection)


def _is_earlier(size: int, like: Tensor) -> Tensor:
    """1.0 where row < column, `[size, size]`. `triu` starts every thread even for the smallest matrix."""
    position = torch.arange(size, dtype=like.dtype, device=like.device)
    return torch.lt(position[:, None], position, out=like.new_empty(size, size))


def _fixed_point(suppresses: Tensor) -> Tensor:
    """Which boxes stay, `[..., K]`; `suppresses[..., K, K]` is strictly upper triangular."""
    stays = torch.ones_like(suppresses[..., 0])
    while True:
        following = 1 - (suppresses * stays[..., None]).amax(-2)
        if torch.equal(following, stays):
            return stays.bool()
        stays = following


def _keep_small_groups(corners: Tensor, start: Tensor, size: Tensor, threshold: float, keep: Tensor) -> None:
    step = torch.arange(int(size.max()), device=corners.device)
    padding = corners.shape[1] - 1  # a box of NaN: suppresses nothing, is suppressed by nothing
    members = torch.where(step < size[:, None], start[:, None] + step, padding)
    many = max(1, SMALL * SMALL // len(step) ** 2)
    scratch = corners.new_empty(5 * min(many, len(size)) * len(step) ** 2)
    is_earlier = _is_earlier(len(step), corners)
    for some in members.split(many):
        boxes = corners[:, some]
        keep[some] = _fixed_point(_suppresses(boxes, boxes, threshold, scratch).mul_(is_earlier))


def _keep_large_group(corners: Tensor, threshold: float, keep: Tensor) -> None:
    position = torch.arange(corners.shape[1], device=corners.device)
    scratch = corners.new_empty(5 * BLOCK * TILE)
    is_earlier = _is_earlier(BLOCK, corners)
    while len(position):
        block, later = corners[:, :BLOCK], corners[:, BLOCK:]
        size = block.shape[1]
        stays = _fixed_point(_suppresses(block, block, threshold, scratch).mul_(is_earlier[:size, :size]))
        keep[position[:size]] = stays
        if not later.shape[1]:
            break
        suppressed = later.new_empty(later.shape[1])
        for tile, out in zip(later.split(TILE, 1), suppressed.split(TILE), strict=True):
            torch.amax(_suppresses(block[:, stays], tile, threshold, scratch), 0, out=out)
        remaining = (suppressed == 0).nonzero()[:, 0]
        corners, position = later.index_select(1, remaining), position[BLOCK:].index_select(0, remaining)


def _corners_and_area(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)])


def _keep(boxes: Tensor, group: Tensor | None, threshold: float) -> Tensor:
    """Which of `boxes[M, 4]`, sorted by score, stay, where boxes can only suppress others of their `group[M]`."""
    boxes = boxes.to(compute_dtype(boxes.dtype))
    if boxes.dtype == torch.float32:
        threshold = round_down_float32(threshold)
    keep = torch.zeros(len(boxes) + 1, dtype=torch.bool, device=boxes.device)  # the last is for the groups' padding
    if group is None or not len(boxes):
        _keep_large_group(_corners_and_area(boxes), threshold, keep)
        return keep[:-1]

    sorted_group, order = group.sort(stable=True)
    _, size = torch.unique_consecutive(sorted_group, return_counts=True)
    start = size.cumsum(0) - size
    corners = torch.nn.functional.pad(_corners_and_area(boxes[order]), (0, 1), value=torch.nan)
    small = size <= SMALL
    if small.any():
        _keep_small_groups(corners, start[small], size[small], threshold, keep)
    for first, many in zip(start[~small].tolist(), size[~small].tolist(), strict=True):
        _keep_large_group(corners[:, first : first + many], threshold, keep[first : first + many])
    return torch.empty_like(keep[:-1]).index_copy_(0, order, keep[:-1])


def nms_reference(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    """Indices of the kept boxes by falling score, of `boxes[N, 4]`, `scores[N]` and `classes[N]`."""
    order = scores.sort(descending=True, stable=True).indices
    group = None if classes is None else classes[order]
    return order[_keep(boxes[order], group, iou_threshold)]


def nms_padded_reference(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, counts: Tensor | None, spec: NMSSpec
) -> tuple[Tensor, Tensor]:
    """All segments as one sorted list of boxes, grouped by segment and class."""
    batch, device = len(boxes), boxes.device
    valid = valid_mask(scores, counts, spec.score_threshold)
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    segment, index = valid.nonzero(as_tuple=True)  # drops invalid boxes before the sort, which is expensive
    order = scores[segment, index].sort(descending=True, stable=True).indices
    if batch > 1:
        order = order[segment[order].sort(stable=True).indices]
    segment, index = segment[order], index[order]

    group = segment if batch > 1 else None
    if classes is not None:
        names, group = classes[segment, index].unique(return_inverse=True)
        group += segment * len(names)
    num_valid = segment.bincount(minlength=batch)
    rank = torch.arange(len(segment), device=device) - (num_valid.cumsum(0) - num_valid)[segment]

    # Whether a box is kept depends on better scores only, so a prefix of each segment that fills its output is enough.
    depth = max(1024, 4 * spec.max_output)
    while True:
        top = (rank < depth).nonzero()[:, 0]
        group_of_top = None if group is None else group[top]
        kept = top[_keep(boxes[segment[top], index[top]], group_of_top, spec.iou_threshold)]
        count = segment[kept].bincount(minlength=batch)
        if ((count >= spec.max_output) | (num_valid <= depth)).all():
            break
        depth *= 4

    place = torch.arange(len(kept), device=device) - (count.cumsum(0) - count)[segment[kept]]
    kept, place = kept[place < spec.max_output], place[place < spec.max_output]
    indices = torch.full((batch, spec.max_output), -1, dtype=torch.int64, device=device)
    indices[segment[kept], place] = index[kept]
    return indices, count.clamp(max=spec.max_output)
