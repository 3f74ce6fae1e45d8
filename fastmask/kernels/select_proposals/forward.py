"""What runs on accelerators: decodes the candidates of each level, suppresses them, and merges the levels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._decode import (
    clip_box,
    decode_box,
    decode_constants,
    is_finite,
    is_large,
    load_four,
    logistic,
    min_size_bits,
    result_dtype,
    store_four,
)
from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    ceil_div,
    float64_bits,
    float_of,
    jit,
    next_power_of_2,
    on_device_of,
    pack_size,
    tl,
    triton_dtype,
)
from fastmask.kernels.nms.bit_matrix import launch_bit_matrix
from fastmask.kernels.nms.gather import ROWS as SORTED_ROWS
from fastmask.kernels.nms.gather import SortedBoxes
from fastmask.kernels.nms.suppression import Candidates
from fastmask.kernels.select_proposals.reference import empty_proposals

if TYPE_CHECKING:
    from fastmask.kernels.select_proposals.op import ProposalSpec

# Both kernels are bound by latency. 16 warps decode 1024 candidates in 623 instructions and 64 registers on sm_90, 8
# warps in 877 and 78. Merging takes 349 instructions and 40 registers, and 5 dependent steps of 3 probes where a binary
# search has 10. Not yet measured on a GPU.
DECODE_BLOCK = 1024  # candidates that a program decodes at a time; at least SORTED_ROWS
DECODE_WARPS = 16
MERGE_ROWS = 32  # kept boxes of a program
MERGE_WARPS = 4


@jit()
def _minimum(a, b):
    return tl.minimum(a, b)


@jit(do_not_specialize=["num_candidates", "num_rows", "min_size_bits", "score_threshold_bits"])
def decode_candidates_kernel(
    logits,  # L of [B, n_l], falling
    indices,  # L of [B, n_l]: their anchors
    deltas,  # L of [B, A_l, 4]
    anchors,  # L of [A_l, 4]
    image_sizes,  # [B, 2]
    boxes,  # [B * L, M, 4]: those that take part, then NaN
    scores,  # [B * L, M] of these boxes, falling
    order,  # [B * L, N]: 0, 1, ...
    num_valid,  # [B * L]
    sizes,  # L packed (n_l, A_l)
    num_candidates,  # N
    num_rows,  # M
    min_size_bits,
    score_threshold_bits,
    WEIGHTS: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    DROP_NON_FINITE: tl.constexpr,
    SIGMOID: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    # One program compacts the candidates of a level, so that the others need neither a mask nor another sort.
    LEVELS: tl.constexpr = len(logits)
    image = tl.program_id(0).to(tl.int64) // LEVELS
    level = tl.program_id(0) % LEVELS
    logit, index, delta, anchor, packed = logits[0], indices[0], deltas[0], anchors[0], sizes[0]
    for i in tl.static_range(1, LEVELS):
        if level == i:
            logit, index, delta, anchor, packed = logits[i], indices[i], deltas[i], anchors[i], sizes[i]
    count = ((packed >> 31) & 0x3FFFFFFF).to(tl.int32)
    delta += image * ((packed >> 1) & 0x3FFFFFFF) * 4
    logit += image * count
    index += image * count
    segment = tl.program_id(0).to(tl.int64)
    boxes += segment * num_rows * 4
    scores += segment * num_rows
    order += segment * num_candidates
    height, width = tl.load(image_sizes + image * 2).to(COMPUTE), tl.load(image_sizes + image * 2 + 1).to(COMPUTE)
    min_size, score_threshold = float_of(min_size_bits, COMPUTE), float_of(score_threshold_bits, COMPUTE)

    lane = tl.arange(0, BLOCK)
    kept = tl.full((), 0, tl.int32)
    lowest = tl.full((), float("inf"), COMPUTE)
    for first in range(0, count, BLOCK):
        row = first + lane
        inside = row < count
        chosen = tl.load(index + row, mask=inside, other=0)
        score = tl.load(logit + row, mask=inside, other=float("-inf")).to(COMPUTE)
        box = decode_box(load_four(anchor, chosen, inside, COMPUTE), load_four(delta, chosen, inside, COMPUTE), WEIGHTS)
        takes_part = inside
        if DROP_NON_FINITE:
            takes_part = takes_part & is_finite(box) & (tl.abs(score) < float("inf"))
        if SIGMOID:
            # Where `exp` is not monotonic in its last bit, the minimum is: merging levels needs falling scores.
            score = logistic(score)
            falling = tl.where(score == score, score, float("inf"))
            falling = tl.minimum(tl.associative_scan(falling, 0, _minimum), lowest)
            lowest = tl.min(falling, 0)
            score = tl.where(score == score, falling, score)
        box = clip_box(box, height, width)
        takes_part = takes_part & is_large(box, min_size, INCLUSIVE)
        takes_part = takes_part & (score > float("-inf")) & (score >= score_threshold)  # neither holds for NaN
        place = kept + tl.cumsum(takes_part.to(tl.int32), 0) - 1
        store_four(boxes, place, box, takes_part)
        tl.store(scores + place, score, mask=takes_part)
        tl.store(order + row, row.to(tl.int64), mask=row < num_candidates)
        kept += tl.sum(takes_part.to(tl.int32), 0)
    tl.store(num_valid + segment, kept.to(tl.int64))
    padding = kept + lane  # up to a multiple of the rows that a program of NMS reads
    nan = tl.full((BLOCK,), float("nan"), COMPUTE)
    store_four(boxes, padding, (nan, nan, nan, nan), padding < (kept + ROWS - 1) // ROWS * ROWS)


@jit(do_not_specialize=["num_rows", "max_kept", "num_proposals", "steps"])
def merge_levels_kernel(
    boxes,  # [B * L, M, 4]
    scores,  # [B * L, M]
    indices,  # [B * L, K] of the kept boxes; scores fall
    kept,  # [B * L]
    out_boxes,  # [B, P, 4]
    out_scores,  # [B, P]
    out_counts,  # [B]
    num_rows,  # M
    max_kept,  # K
    num_proposals,  # P
    steps,  # of a search among K boxes, in quarters
    LEVELS: tl.constexpr,
    LANES: tl.constexpr,  # a power of two, at least LEVELS
    ROWS: tl.constexpr,
):
    # The place of a kept box is its place in its level and the number of those before it in each other level.
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    segments = image * LEVELS + lane
    counts = tl.load(kept + segments, mask=lane < LEVELS, other=0).to(tl.int32)
    total = tl.minimum(tl.sum(counts, 0), num_proposals)
    tl.store(out_counts + image, total.to(tl.int64), mask=tl.program_id(1) == 0)
    empty = (row >= total) & (row < num_proposals)
    zero = tl.zeros((ROWS,), scores.dtype.element_ty)
    out_boxes += image * num_proposals * 4
    out_scores += image * num_proposals
    store_four(out_boxes, row, (zero, zero, zero, zero), empty)
    tl.store(out_scores + row, zero, mask=empty)

    level = row // max_kept
    place = row - level * max_kept
    segment = image * LEVELS + level
    inside = level < LEVELS
    inside = inside & (place < tl.load(kept + segment, mask=inside, other=0))
    position = segment * num_rows + tl.load(indices + segment * max_kept + place, mask=inside, other=0)
    score = tl.load(scores + position, mask=inside, other=0.0)
    low = tl.zeros((ROWS, LANES), tl.int32)
    high = low + tl.where(inside[:, None], counts[None, :], 0)
    for _ in range(steps):
        size, begin = high - low, low
        for i in tl.static_range(1, 4):  # three probes at once: half as many dependent loads as with one
            probe = begin + size * i // 4
            other = tl.load(indices + segments[None, :] * max_kept + probe, mask=size > 0, other=0)
            other = tl.load(scores + segments[None, :] * num_rows + other, mask=size > 0, other=0.0)
            is_before = (other > score[:, None]) | ((other == score[:, None]) & (lane[None, :] < level[:, None]))
            low = tl.where((size > 0) & is_before, probe + 1, low)
            high = tl.where((size > 0) & ~is_before, tl.minimum(high, probe), high)
    place += tl.sum(tl.where(lane[None, :] == level[:, None], 0, low), 1)
    inside = inside & (place < num_proposals)
    store_four(out_boxes, place, load_four(boxes, position, inside, scores.dtype.element_ty), inside)
    tl.store(out_scores + place, score, mask=inside)


class _Launches(NamedTuple):
    decode: Launch
    merge: Launch
    num_candidates: int  # N
    max_kept: int  # K


@lru_cache(maxsize=1024)
def _prepared(spec: ProposalSpec, levels: tuple[int, ...], dtype: torch.dtype) -> _Launches:
    """The launches for levels of these numbers of anchors."""
    counts = [min(spec.pre_nms_top_k, size) for size in levels]
    num_candidates = max(counts)
    num_rows = ceil_div(num_candidates, SORTED_ROWS) * SORTED_ROWS
    max_kept = min(num_candidates, spec.post_nms_top_k)
    threshold = float("-inf") if spec.score_threshold is None else spec.score_threshold
    decode = Launch(
        decode_candidates_kernel,
        tuple(pack_size(count, size) for count, size in zip(counts, levels, strict=True)),
        num_candidates,
        num_rows,
        min_size_bits(spec),
        float64_bits(threshold),
        SIGMOID=spec.score_activation == "sigmoid",
        BLOCK=DECODE_BLOCK,
        ROWS=SORTED_ROWS,
        COMPUTE=triton_dtype(dtype),
        num_warps=DECODE_WARPS,
        enable_fp_fusion=False,
        **decode_constants(spec),
    )
    merge = Launch(
        merge_levels_kernel,
        num_rows,
        max_kept,
        spec.post_nms_top_k,
        ceil_div(max_kept.bit_length(), 2) if len(levels) > 1 else 0,
        LEVELS=len(levels),
        LANES=next_power_of_2(len(levels)),
        ROWS=MERGE_ROWS,
        num_warps=MERGE_WARPS,
    )
    return _Launches(decode, merge, num_candidates, max_kept)


def launch_select_proposals(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_sizes: Tensor,
    spec: ProposalSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dtype, device = logits[0].shape[0], result_dtype(logits[0], deltas[0], anchors[0]), logits[0].device
    levels = tuple([logit.shape[1] for logit in logits])
    if not batch * max(levels) * spec.pre_nms_top_k * spec.post_nms_top_k:
        return empty_proposals(logits[0], batch, dtype, spec)
    decode, merge, num_candidates, max_kept = _prepared(spec, levels, dtype)
    segments, num_rows = batch * len(levels), ceil_div(num_candidates, SORTED_ROWS) * SORTED_ROWS
    boxes = torch.empty((segments, num_rows, 4), dtype=dtype, device=device)
    scores = torch.empty((segments, num_rows), dtype=dtype, device=device)
    order = torch.empty((segments, num_candidates), dtype=torch.int64, device=device)
    num_valid = torch.empty(segments, dtype=torch.int64, device=device)
    indices = torch.empty((segments, max_kept), dtype=torch.int64, device=device)
    kept = torch.empty(segments, dtype=torch.int64, device=device)
    out = (
        torch.empty((batch, spec.post_nms_top_k, 4), dtype=dtype, device=device),
        torch.empty((batch, spec.post_nms_top_k), dtype=dtype, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
    )
    best = [logit.topk(min(spec.pre_nms_top_k, size)) for logit, size in zip(logits, levels, strict=True)]
    with on_device_of(boxes):
        decode(
            (segments,),
            tuple([values for values, _ in best]),
            tuple([index for _, index in best]),
            tuple([delta.contiguous() for delta in deltas]),
            tuple([anchor.contiguous() for anchor in anchors]),
            image_sizes.contiguous(),
            boxes,
            scores,
            order,
            num_valid,
        )
        candidates = Candidates(boxes, None, order, num_valid)
        launch_bit_matrix(candidates, SortedBoxes(boxes, None), spec.iou_threshold, indices, kept)
        rows = max(len(levels) * max_kept, spec.post_nms_top_k)
        merge((batch, ceil_div(rows, MERGE_ROWS)), boxes, scores, indices, kept, *out)
    return out
