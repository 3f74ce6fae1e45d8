"""Candidates by falling score, found by counting: the place of one is the number of those that come before it.

A proposal has slots for all classes that can pass the threshold, and most are empty. The candidates are first listed
without gaps, then counted as in `nms/rank.py`; work grows with the square of their number, and 2,000 of 1000 proposals
take 4 million comparisons. `torch.sort` of the 20,000 slots is about eight launches. If all slots were taken, counting
would take 400 million comparisons, about 50 us of the device: as long as the sort, by estimate. Beyond
`MAX_RANKED_SLOTS`, and for float64 scores, `torch.sort` it is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import ceil_div, jit, next_power_of_2, tl
from fastmask.kernels.nms.rank import COLUMNS, ROWS, load_key

MAX_RANKED_SLOTS = 32768  # of an image
LISTED_SLOTS = 1024  # that a program of the first kernel reads: 32 registers; not yet measured on a GPU


@jit(do_not_specialize=["num_proposals"])
def list_candidates_kernel(
    scores,  # [B, N, SLOTS]
    num_candidates,  # [B, N]
    listed_scores,  # [B, N * SLOTS]: of the candidates, then not written
    slots,  # [B, N * SLOTS]: where they are, then not written
    totals,  # [B]
    num_proposals,  # N
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,  # a power of two, at least SLOTS
    PROPOSALS: tl.constexpr,  # of a program
):
    image = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * PROPOSALS
    num_candidates += image * num_proposals
    scores += image * num_proposals * SLOTS
    listed_scores += image * num_proposals * SLOTS
    slots += image * num_proposals * SLOTS
    before = tl.zeros((1024,), tl.int32)
    for first in range(0, begin, 1024):
        earlier = first + tl.arange(0, 1024)
        before += tl.load(num_candidates + earlier, mask=earlier < begin, other=0)
    proposal = begin + tl.arange(0, PROPOSALS)
    number = tl.load(num_candidates + proposal, mask=proposal < num_proposals, other=0)
    start = tl.sum(before, 0) + tl.cumsum(number, 0) - number
    lane = tl.arange(0, LANES)[None, :]
    slot = proposal[:, None] * SLOTS + lane
    taken = lane < number[:, None]
    place = start[:, None] + lane
    tl.store(listed_scores + place, tl.load(scores + slot, mask=taken, other=0.0), mask=taken)
    tl.store(slots + place, slot, mask=taken)
    total = tl.sum(before, 0) + tl.sum(number, 0)
    tl.store(totals + image, total.to(tl.int64), mask=begin + PROPOSALS >= num_proposals)


@jit(do_not_specialize=["num_slots"])
def order_candidates_kernel(
    listed_scores,  # [B, S]
    slots,  # [B, S]
    totals,  # [B]
    order,  # [B, S]: slots by falling score, then not written
    num_slots,  # S
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * ROWS
    total = tl.load(totals + image).to(tl.int32)
    if begin < total:
        listed_scores += image * num_slots
        row = begin + tl.arange(0, ROWS)
        key, inside = load_key(listed_scores, None, row, total, total)
        before = tl.zeros((ROWS, COLUMNS), tl.int32)
        for first in range(0, total, COLUMNS):
            other, _ = load_key(listed_scores, None, first + tl.arange(0, COLUMNS), total, total)
            before += (other[None, :] > key[:, None]).to(tl.int32)
        slot = tl.load(slots + image * num_slots + row, mask=inside, other=0)
        tl.store(order + image * num_slots + tl.sum(before, 1), slot.to(tl.int64), mask=inside)


@lru_cache(maxsize=64)
def _prepared(slots: int, lanes: int, proposals: int) -> tuple[Launch, Launch]:
    return (
        Launch(list_candidates_kernel, SLOTS=slots, LANES=lanes, PROPOSALS=proposals),
        Launch(order_candidates_kernel, ROWS=ROWS, COLUMNS=COLUMNS),
    )


def launch_order(scores: Tensor, num_candidates: Tensor) -> tuple[Tensor, Tensor]:
    """`order[B, S]` of the slots, whose first `totals[B]` are candidates.

    Args:
        scores: `[B, S]`, -inf in the slots of a proposal after its candidates.
        num_candidates: `[B, N]`.
    """
    (batch, num_slots), num_proposals, device = scores.shape, num_candidates.shape[1], scores.device
    if num_slots > MAX_RANKED_SLOTS or scores.dtype == torch.float64:
        return scores.sort(dim=1, descending=True, stable=True).indices, num_candidates.sum(1)
    per_proposal = num_slots // num_proposals
    lanes = next_power_of_2(per_proposal)
    proposals = max(1, LISTED_SLOTS // lanes)
    list_candidates, order_candidates = _prepared(per_proposal, lanes, proposals)
    listed_scores = torch.empty_like(scores)
    slots = torch.empty((batch, num_slots), dtype=torch.int32, device=device)
    order = torch.empty((batch, num_slots), dtype=torch.int64, device=device)
    totals = torch.empty(batch, dtype=torch.int64, device=device)
    grid = batch, ceil_div(num_proposals, proposals)
    list_candidates(grid, scores, num_candidates, listed_scores, slots, totals, num_proposals)
    order_candidates((batch, ceil_div(num_slots, ROWS)), listed_scores, slots, totals, order, num_slots)
    return order, totals
