"""Greedy non-maximum suppression in plain torch: the reference, and what runs on the CPU.

Boxes are sorted by score. A box stays unless an earlier box that stays suppresses it; this rule has one fixed point,
the greedy result, and iterating it takes as many steps as the longest chain of suppressions has links. The fastest of
three ways finds the pairs that matter:

- few boxes: all pairs as one matrix;
- most lists: only the pairs that can overlap enough, from `candidate_pairs.py`;
- crowds, where those are too many: blocks of sorted boxes. Those of a block that stay are compared with all later
  boxes, and what they suppress is never looked at again.

In lists of 1024 or more boxes without classes, the best box is tested first, again and again, as long as it suppresses
an eighth of the others. Only the rest is sorted.

Boxes of different groups (classes, segments) are never compared. Equal to torchvision's CPU operator bit for bit: the
same operations on the same floats.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels.nms.candidate_pairs import CandidatePairs, find_candidate_pairs, list_pairs

if TYPE_CHECKING:
    from fastmask.kernels.nms.op import NMSSpec

ALL_PAIRS = 320  # up to this many boxes one matrix of all pairs takes less time than a search for candidates
MIN_CROWD = 1024  # from this size on the best box is tested first: if it suppresses many others, they need no sort
FIRST_BLOCK = 16  # blocks grow from this size, since the first ones of a crowd drop most of it
BLOCK = 256  # with TILE: the fastest of {96, 128, 192, 256, 384} x {512, 1024, 2048} for 1000 and for 10,000 boxes
TILE = 2048  # later boxes per pass, so that the pass's intermediates stay in cache; at least BLOCK


def _max_pairs(size: int) -> int:
    """The number of candidate pairs of M boxes up to which a list of them takes less time than blocks.

    A pair takes about 12 times as long in a list as in a matrix, and blocks look at few pairs of dropped boxes.
    """
    return max(8192, size * min(64, size // 24))


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


class _Boxes(NamedTuple):
    """M boxes, by falling score unless scores are beside them."""

    extent: Tensor  # [4, M]: -x1, -y1, x2, y2; the minimum of two of them is the extent of the intersection
    area: Tensor  # [M]
    group: Tensor | None  # [M] int64

    @classmethod
    def of(cls, boxes: Tensor, group: Tensor | None) -> _Boxes:
        extent = boxes.t().clone(memory_format=torch.contiguous_format)
        low, high = extent.chunk(2)
        width, height = high + low.neg_()
        return cls(extent, width * height, group)

    def take(self, index: Tensor) -> _Boxes:
        group = None if self.group is None else self.group.index_select(0, index)
        return _Boxes(self.extent.index_select(1, index), self.area.index_select(0, index), group)

    def part(self, start: int, end: int) -> _Boxes:
        group = None if self.group is None else self.group[start:end]
        return _Boxes(self.extent[:, start:end], self.area[start:end], group)


def _exceeds(nearest: Tensor, areas: Tensor, threshold: float) -> Tensor:
    """IoU > threshold, boolean, of pairs: the minima of their extents `[4, P]` and the sums of their areas `[P]`."""
    low, high = nearest.chunk(2)
    width, height = low.add_(high).clamp_(min=0)
    intersection = width.mul_(height)
    return intersection.div(areas.sub_(intersection)) > threshold


def _suppresses(first: _Boxes, second: _Boxes, threshold: float, scratch: Tensor) -> Tensor:
    """1.0 where IoU > threshold and the groups are equal, `[K, T]`.

    Fresh memory for each intermediate would cost more than the arithmetic: all are in `scratch`, at least 4 * K * T.
    """
    shape = (4, first.area.shape[0], second.area.shape[0])
    nearest = scratch.narrow(0, 0, 4 * shape[1] * shape[2]).view(shape)
    torch.minimum(first.extent.unsqueeze(2), second.extent.unsqueeze(1), out=nearest)
    low, high = nearest.chunk(2)
    width, height = torch.add(low, high, out=low).clamp_(min=0).unbind()
    union, hit = high.unbind()
    intersection = width.mul_(height)
    torch.add(first.area.unsqueeze(1), second.area, out=union).sub_(intersection)
    torch.gt(intersection.div_(union), threshold, out=hit)
    return hit if first.group is None else hit.mul_(first.group[:, None] == second.group)


@lru_cache(maxsize=4)
def _is_earlier(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1.0 where row < column, `[size, size]`."""
    position = torch.arange(size, dtype=dtype, device=device)
    return (position[:, None] < position).to(dtype)


def _keep_by_matrix(boxes: _Boxes, threshold: float, scratch: Tensor | None = None) -> Tensor:
    """Which boxes stay, boolean `[M]`, from all their pairs; see `_suppresses` for `scratch`."""
    size = len(boxes.area)
    if scratch is None:
        scratch = boxes.extent.new_empty(4 * size * size)
    suppresses = _suppresses(boxes, boxes, threshold, scratch)
    is_earlier = _is_earlier(max(BLOCK, ALL_PAIRS), scratch.dtype, scratch.device)
    suppressed_by = suppresses.mul_(is_earlier[:size, :size]).t()
    stays = scratch.new_ones(size)
    while True:
        following = torch.mv(suppressed_by, stays).eq_(0)  # exact: a sum of fewer than 2^24 ones
        if torch.equal(following, stays):
            return stays.bool()
        stays = following


def _keep_by_pairs(boxes: _Boxes, pairs: CandidatePairs, threshold: float) -> Tensor:
    """Which boxes stay, boolean `[M]`, from the pairs that can overlap enough."""
    edges = []
    table = torch.cat([boxes.extent, boxes.area[None]]).index_select(1, pairs.order)
    for first, second in list_pairs(pairs):
        one, other = table.index_select(1, first), table.index_select(1, second)
        hit = _exceeds(one[:4].minimum(other[:4]), one[4] + other[4], threshold).nonzero()[:, 0]
        edges.append(torch.stack([first.index_select(0, hit), second.index_select(0, hit)]))
    one, other = pairs.order[torch.cat(edges, 1)] if edges else pairs.order.new_empty(2, 0)
    earlier, later = one.minimum(other), one.maximum(other)
    stays = torch.ones_like(boxes.area, dtype=torch.bool)
    while True:
        following = torch.ones_like(stays).index_fill_(0, later[stays[earlier]], 0)
        if torch.equal(following, stays):
            return stays
        stays = following


def _keep_by_blocks(boxes: _Boxes, threshold: float) -> Tensor:
    """Which boxes stay, boolean `[M]`, block by block."""
    scratch = boxes.extent.new_empty(4 * BLOCK * TILE)
    position = torch.arange(len(boxes.area), device=scratch.device)
    keep = torch.zeros_like(position, dtype=torch.bool)
    size = min(FIRST_BLOCK, BLOCK)
    while len(position):
        block, later = boxes.part(0, size), boxes.part(size, len(position))
        stays = _keep_by_matrix(block, threshold, scratch)
        keep[position[:size]] = stays
        kept, suppressed = block.take(stays.nonzero()[:, 0]), torch.empty_like(later.area)
        for start in range(0, len(suppressed), TILE):
            end = start + TILE
            torch.amax(_suppresses(kept, later.part(start, end), threshold, scratch), 0, out=suppressed[start:end])
        remaining = (suppressed == 0).nonzero()[:, 0]
        boxes, position = later.take(remaining), position[size:][remaining]
        size = min(2 * size, BLOCK)
    return keep


def _keep_best(boxes: _Boxes, scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Indices of the best boxes, one by one while each suppresses an eighth of the others, and of the rest."""
    kept, rest = [], torch.arange(len(scores), device=scores.device)
    extent, area, _ = boxes
    while len(rest):
        best = int(scores.argmax())  # the first of equal ones, and NaN before all, as in a stable sort
        kept.append(rest[best])
        hit = _exceeds(extent.minimum(extent[:, best : best + 1]), area + area[best], threshold)
        hit[best] = True
        remaining = hit.logical_not_().nonzero()[:, 0]
        rest = rest.index_select(0, remaining)
        if 8 * len(rest) > 7 * len(scores):
            break
        extent, area = extent.index_select(1, remaining), area.index_select(0, remaining)
        scores = scores.index_select(0, remaining)
    return torch.stack(kept), rest


def _keep(boxes: _Boxes, threshold: float) -> Tensor:
    """Which boxes stay, boolean `[M]`, where boxes can only suppress others of their group."""
    size = len(boxes.area)
    if size <= ALL_PAIRS:
        return _keep_by_matrix(boxes, threshold)
    if boxes.group is not None:
        return _keep_groups(boxes, threshold)
    pairs = find_candidate_pairs(boxes.extent, boxes.area, None, threshold)
    if pairs.partners.sum() <= _max_pairs(size):
        return _keep_by_pairs(boxes, pairs, threshold)
    return _keep_by_blocks(boxes, threshold)


def _keep_groups(boxes: _Boxes, threshold: float) -> Tensor:
    """Which boxes stay, boolean `[M]`: the pairs of all groups at once, except of those that have too many."""
    extent, area, group = boxes
    assert group is not None
    pairs = find_candidate_pairs(extent, area, group, threshold)
    group_of_range = group[pairs.order[pairs.first]]
    size = group.bincount()
    count = torch.zeros_like(size).index_add_(0, group_of_range, pairs.partners)
    limit = torch.tensor([_max_pairs(members) for members in size.tolist()], device=size.device)
    crowds = (count > limit).nonzero()[:, 0]
    listed = pairs.partners.where(~torch.isin(group_of_range, crowds), 0) if len(crowds) else pairs.partners
    keep = _keep_by_pairs(boxes, pairs._replace(partners=listed), threshold)
    for crowd in crowds:
        members = (group == crowd).nonzero()[:, 0]
        of_crowd = _Boxes(extent[:, members], area[members], None)
        keep_crowd = _keep_by_matrix if len(members) <= ALL_PAIRS else _keep_by_blocks
        keep[members] = keep_crowd(of_crowd, threshold)
    return keep


def _exact_threshold(iou_threshold: float, dtype: torch.dtype) -> float:
    """The threshold in the dtype of IoUs."""
    return iou_threshold if dtype == torch.float64 else round_down_float32(iou_threshold)


def nms_reference(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    """Indices of the kept boxes by falling score, of `boxes[N, 4]`, `scores[N]` and `classes[N]`."""
    boxes, scores = (tensor.to(compute_dtype(tensor.dtype)) for tensor in (boxes, scores))
    threshold = _exact_threshold(iou_threshold, boxes.dtype)
    if classes is None and len(scores) >= MIN_CROWD:
        best, rest = _keep_best(_Boxes.of(boxes, None), scores, threshold)
        order = rest[scores[rest].sort(descending=True, stable=True).indices]
        return torch.cat([best, order[_keep(_Boxes.of(boxes.index_select(0, order), None), threshold)]])
    order = scores.sort(descending=True, stable=True).indices
    group = None if classes is None else classes[order].unique(return_inverse=True)[1]
    return order[_keep(_Boxes.of(boxes.index_select(0, order), group), threshold)]


def nms_padded_reference(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, counts: Tensor | None, spec: NMSSpec
) -> tuple[Tensor, Tensor]:
    """All segments as one sorted list of boxes, grouped by segment and class."""
    batch, device = len(boxes), boxes.device
    boxes = boxes.to(compute_dtype(boxes.dtype))
    threshold = _exact_threshold(spec.iou_threshold, boxes.dtype)
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
        sorted_boxes = _Boxes.of(boxes[segment[top], index[top]], group_of_top)
        kept = top[_keep(sorted_boxes, threshold)]
        count = segment[kept].bincount(minlength=batch)
        if ((count >= spec.max_output) | (num_valid <= depth)).all():
            break
        depth *= 4

    place = torch.arange(len(kept), device=device) - (count.cumsum(0) - count)[segment[kept]]
    kept, place = kept[place < spec.max_output], place[place < spec.max_output]
    indices = torch.full((batch, spec.max_output), -1, dtype=torch.int64, device=device)
    indices[segment[kept], place] = index[kept]
    return indices, count.clamp(max=spec.max_output)
