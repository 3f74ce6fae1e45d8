"""What runs on accelerators: scores and decodes, orders, suppresses, and gathers."""

from __future__ import annotations

import math
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
    tl,
    triton_dtype,
)
from fastmask.kernels.nms.scan import launch_scan
from fastmask.kernels.nms.suppression import Candidates
from fastmask.kernels.select_detections.order import launch_order
from fastmask.kernels.select_detections.reference import empty_detections, first_class

if TYPE_CHECKING:
    from fastmask.kernels.select_detections.op import DetectionSpec

# With 81 columns a warp has a proposal: the softmax needs no barrier. 64 registers and 951 instructions on sm_90, where
# 8 proposals of a program take 139 registers. Not yet measured on a GPU.
TILE = 512  # scores of a program: proposals times columns, a power of two
WARPS = 4
GATHER_ROWS = 128  # detections of a program


@jit(do_not_specialize=["num_proposals", "num_rows", "min_size_bits", "score_threshold_bits"])
def score_proposals_kernel(
    class_logits,  # [B * N, C]
    deltas,  # [B * N, DELTAS, 4]
    proposals,  # [B * N, 4]
    counts,  # [B]
    image_sizes,  # [B, 2]
    boxes,  # [B * N, SLOTS, 4]: of candidates, then not written
    scores,  # [B * N, SLOTS]: of candidates, then -inf
    labels,  # [B * N, SLOTS]: of candidates, then not written
    num_candidates,  # [B * N]
    num_proposals,  # N
    num_rows,  # B * N
    min_size_bits,
    score_threshold_bits,
    C: tl.constexpr,  # classes and the background
    DELTAS: tl.constexpr,  # boxes of a proposal
    FIRST: tl.constexpr,  # the column of the first class
    SLOTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    DROP_NON_FINITE: tl.constexpr,
    SIGMOID: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, at least C
    COMPUTE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < num_rows
    image = row // num_proposals
    takes_part = inside & (row - image * num_proposals < tl.load(counts + image, mask=inside, other=0))
    row = row.to(tl.int64)
    is_column = takes_part[:, None] & (column < C)
    is_class = (column >= FIRST) & (column < FIRST + C - 1)

    logit = tl.load(class_logits + row[:, None] * C + column, mask=is_column, other=float("-inf")).to(COMPUTE)
    if SIGMOID:
        score = logistic(logit)
    else:
        exponential = tl.exp(logit - tl.max(logit, 1)[:, None])
        total = tl.sum(tl.where(is_column, exponential, 0.0), 1)
        score = exponential * (1.0 / total)[:, None]
    candidate = is_column & is_class & (score > float_of(score_threshold_bits, COMPUTE))
    decoded = candidate
    if DROP_NON_FINITE:
        decoded = is_column & ((DELTAS == C) | is_class)
    number = tl.zeros((ROWS,), tl.int32)
    if tl.max(decoded.to(tl.int32)) > 0:
        anchor = load_four(proposals, row, takes_part, COMPUTE)
        anchor = anchor[0][:, None], anchor[1][:, None], anchor[2][:, None], anchor[3][:, None]
        index = row[:, None] * DELTAS
        if DELTAS == 1:
            index += column * 0
        elif DELTAS == C:
            index += column
        else:
            index += column - FIRST
        box = decode_box(anchor, load_four(deltas, index, decoded, COMPUTE), WEIGHTS)
        if DROP_NON_FINITE:  # with all classes of its proposal
            finite = (is_finite(box) | ~decoded) & ((tl.abs(score) < float("inf")) | ~is_column)
            candidate = candidate & (tl.min(finite.to(tl.int32), 1) != 0)[:, None]
        height = tl.load(image_sizes + image * 2, mask=inside, other=0).to(COMPUTE)
        width = tl.load(image_sizes + image * 2 + 1, mask=inside, other=0).to(COMPUTE)
        box = clip_box(box, height[:, None], width[:, None])
        candidate = candidate & is_large(box, float_of(min_size_bits, COMPUTE), INCLUSIVE)
        place = tl.cumsum(candidate.to(tl.int32), 1) - 1
        candidate = candidate & (place < SLOTS)
        slot = row[:, None] * SLOTS + place
        store_four(boxes, slot, box, candidate)
        tl.store(scores + slot, score, mask=candidate)
        tl.store(labels + slot, column + place * 0, mask=candidate)
        number = tl.sum(candidate.to(tl.int32), 1)
    tl.store(num_candidates + row, number, mask=inside)
    empty = inside[:, None] & (column >= number[:, None]) & (column < SLOTS)
    nothing = tl.full((ROWS, COLUMNS), float("-inf"), COMPUTE)
    tl.store(scores + row[:, None] * SLOTS + column, nothing, mask=empty)


@jit(do_not_specialize=["num_slots", "max_detections"])
def gather_detections_kernel(
    boxes,  # [B, S, 4]
    scores,  # [B, S]
    labels,  # [B, S]
    indices,  # [B, D], then -1
    out_boxes,  # [B, D, 4]
    out_scores,  # [B, D]
    out_labels,  # [B, D]
    num_slots,  # S
    max_detections,  # D
    ROWS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < max_detections
    row += image * max_detections
    index = tl.load(indices + row, mask=inside, other=-1)
    detected = index >= 0
    index += image * num_slots
    store_four(out_boxes, row, load_four(boxes, index, detected, scores.dtype.element_ty), inside)
    tl.store(out_scores + row, tl.load(scores + index, mask=detected, other=0.0), mask=inside)
    tl.store(out_labels + row, tl.load(labels + index, mask=detected, other=0).to(tl.int64), mask=inside)


class _Launches(NamedTuple):
    score: Launch
    gather: Launch
    rows: int  # of a program of `score`
    slots: int  # of a proposal


def _slots(spec: DetectionSpec, classes: int) -> int:
    """The largest number of classes of a proposal whose scores exceed the threshold, with a margin for rounding."""
    if spec.score_activation == "softmax" and spec.score_threshold * classes > 1:
        return max(1, min(classes, math.floor((1 + 1e-4) / spec.score_threshold)))
    return classes


@lru_cache(maxsize=1024)
def _prepared(
    spec: DetectionSpec, num_proposals: int, num_rows: int, columns: int, deltas: int, dtype: torch.dtype
) -> _Launches:
    slots, width = _slots(spec, columns - 1), next_power_of_2(columns)
    rows = max(1, TILE // width)
    score = Launch(
        score_proposals_kernel,
        num_proposals,
        num_rows,
        min_size_bits(spec),
        float64_bits(spec.score_threshold),
        C=columns,
        DELTAS=deltas,
        FIRST=first_class(spec),
        SLOTS=slots,
        SIGMOID=spec.score_activation == "sigmoid",
        ROWS=rows,
        COLUMNS=width,
        COMPUTE=triton_dtype(dtype),
        num_warps=min(16, max(WARPS, width // 128)),
        enable_fp_fusion=False,
        **decode_constants(spec),
    )
    gather = Launch(gather_detections_kernel, num_proposals * slots, spec.max_detections, ROWS=GATHER_ROWS)
    return _Launches(score, gather, rows, slots)


def launch_select_detections(
    class_logits: Tensor, deltas: Tensor, proposals: Tensor, counts: Tensor, image_sizes: Tensor, spec: DetectionSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, num_proposals), columns = proposals.shape[:2], class_logits.shape[1]
    dtype, device = result_dtype(class_logits, deltas, proposals), proposals.device
    if not batch * num_proposals * (columns - 1) * spec.max_detections:
        return empty_detections(proposals, batch, dtype, spec)
    num_rows, size = batch * num_proposals, spec.max_detections
    launches = _prepared(spec, num_proposals, num_rows, columns, deltas.shape[1], dtype)
    num_slots = num_proposals * launches.slots
    boxes = torch.empty((batch, num_slots, 4), dtype=dtype, device=device)
    scores = torch.empty((batch, num_slots), dtype=dtype, device=device)
    labels = torch.empty((batch, num_slots), dtype=torch.int32, device=device)
    num_candidates = torch.empty((batch, num_proposals), dtype=torch.int32, device=device)
    indices = torch.empty((batch, size), dtype=torch.int64, device=device)
    out = (
        torch.empty((batch, size, 4), dtype=dtype, device=device),
        torch.empty((batch, size), dtype=dtype, device=device),
        torch.empty((batch, size), dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
    )
    with on_device_of(proposals):
        launches.score(
            (ceil_div(num_rows, launches.rows),),
            class_logits.contiguous(),
            deltas.contiguous(),
            proposals.contiguous(),
            counts.contiguous(),
            image_sizes.contiguous(),
            boxes,
            scores,
            labels,
            num_candidates,
        )
        order, totals = launch_order(scores, num_candidates)
        launch_scan(Candidates(boxes, labels, order, totals), spec.iou_threshold, indices, out[3])
        launches.gather((batch, ceil_div(size, GATHER_ROWS)), boxes, scores, labels, indices, *out[:3])
    return out
