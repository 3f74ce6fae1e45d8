"""The pairs of boxes whose IoU can exceed a threshold, without a look at all pairs.

IoU(a, b) > t > 0 needs, with w and c the width and the centre of a box along x,

    t < area(a) / area(b) < 1 / t          |c(a) - c(b)| <= min(w(a), w(b)) * (1 - t) / (2 t)

The intersection is at most the smaller area, and the union at least the larger. IoU is at most the IoU of the sides
along x: for sides that overlap in part, |c(a) - c(b)| < (w(a) + w(b)) / 2 * (1 - t) / (1 + t), and for a side within
the other, |c(a) - c(b)| <= (max w - min w) / 2; both are at most the bound, since max w < min w / t.

Boxes are sorted by (group, class of area, centre), where a class spans a ratio of 1 / t. The partners of a box then lie
in two ranges: behind it in its own class, and around its centre in the next class. Margins cover rounding, so that the
pairs are a superset, and the caller tests each pair exactly. Pairs are of one group as long as classes times groups
stay below 2^47.

A box whose area is not positive and finite has an IoU of 0 or NaN with every other, and is in no pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PAIRS = 1 << 18  # listed at a time: about 20 MB
_MARGIN = 2e-6  # relative; a float32 IoU may be off by 8e-7
_MIN_AREA = 2.0**-100  # below, intersections may be subnormal, whose relative error is large


class CandidatePairs(NamedTuple):
    """Pairs (first, second) of positions in `order`; each first has one range of seconds, of R ranges."""

    order: Tensor  # [U] indices of the boxes that have an area, sorted by group first
    first: Tensor  # [R]
    start: Tensor  # [R] position of the first second
    partners: Tensor  # [R] its number of seconds


def find_candidate_pairs(extent: Tensor, area: Tensor, group: Tensor | None, threshold: float) -> CandidatePairs:
    """Candidates among N boxes: `extent[4, N]` (-x1, -y1, x2, y2), `area[N]`, `group[N]` int64 >= 0."""
    usable = None
    if not ((area > 0) & (area < torch.inf)).all():
        usable = ((area > 0) & (area < torch.inf)).nonzero()[:, 0]
        extent, area, group = extent[:, usable], area[usable], None if group is None else group[usable]
    left, right = extent[0].double() * -0.5, extent[2].double() * 0.5
    centre, width = left + right, (right - left) * 2
    threshold = max(threshold, 5e-324) * (1 - _MARGIN)
    area_class = area.double().log().div_(_MARGIN - math.log(threshold)).floor_()
    if not len(area):
        none = area.new_empty(0, dtype=torch.int64)
        return CandidatePairs(none, none, none, none)
    centre -= centre.min()
    spread = float(centre.max())
    if group is not None:
        area_class -= area_class.min()
        area_class += group * (area_class.max() + 2)  # the next class of a group's last one is empty
    rounding = float(extent.abs().max()) * 2.0**-50  # of two centres
    step = 3 * (spread + rounding) + 1  # more than a centre and two reaches, so that classes and groups stay apart
    key, order = (area_class * step).add_(centre).sort()
    reach = width.where(area >= _MIN_AREA, torch.inf)[order] * ((1 - threshold) / (2 * threshold))
    reach = reach.clamp_(0, spread).add_(rounding + float(key.abs().max()) * 2.0**-49)
    ends = torch.searchsorted(key, torch.stack([key + reach, key + (step - reach), key + (step + reach)]), right=True)
    position = torch.arange(len(key), device=key.device)
    following = position + 1
    return CandidatePairs(
        order if usable is None else usable[order],
        position.repeat(2),
        torch.cat([following, ends[1]]),
        torch.cat([ends[0] - following, ends[2] - ends[1]]),
    )


def list_pairs(pairs: CandidatePairs) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs (first, second), about `MAX_PAIRS` at a time, as positions in `order`."""
    _, first, start, count = pairs
    total = count.cumsum(0)
    number = int(total[-1]) if len(total) else 0
    shift = start - total + count  # from a pair's number to its second
    bounds = [0, len(count)]
    if number > MAX_PAIRS:
        limits = torch.arange(MAX_PAIRS, number, MAX_PAIRS, device=total.device)
        bounds[1:1] = torch.searchsorted(total, limits).tolist()
    listed = 0
    for begin, end in pairwise(bounds):
        of_range = torch.repeat_interleave(count[begin:end])
        second = torch.arange(listed, listed + len(of_range), device=count.device)
        second += shift[begin:end].index_select(0, of_range)
        yield first[begin:end].index_select(0, of_range), second
        listed += len(of_range)
