"""Greedy class-aware non-maximum suppression over many segments, with fixed-capacity output.

Boxes are visited by falling score, ties by rising index; one is kept unless a box kept before it, of the same
class, has IoU > threshold with it:

    IoU(a, b) = |a & b| / (|a| + |b| - |a & b|),    in float32 (float64 boxes: float64), rounded as written

B segments (images, pyramid levels), N boxes in each. A box is `(x1, y1, x2, y2)` in any one unit, its area
`(x2 - x1) * (y2 - y1)`. Classes are compared: the usual trick, shifting each class out of the others' reach,
changes IoUs by rounding. An IoU of NaN (two boxes without area, a NaN or infinite side) suppresses nothing.

Two ways, by the size of the output:

- Few results wanted: one launch, one program per segment. Blocks of sorted boxes meet the boxes kept so far,
  then each other, until the output is full: most candidates of a detector are never read.
- Many: the sorted boxes go by in chunks of up to `CHUNK`. All of the device computes the chunk's bits of "row
  suppresses column", one program per segment resolves them, and the boxes of later chunks are tested against
  the kept ones in parallel. Up to `CHUNK` boxes these are two launches; beyond, 200,000 boxes take 2 MB of
  bits where an N x N matrix of them takes 5 GB.

Inside a block the greedy result is the only fixed point of "stays unless an earlier one that stays suppresses
it". Indices are written in place, so nothing is compacted and the host never waits. Deterministic, bit for
bit the result of a sequential scan: no atomics, one writer per element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._runtime import compute_dtype, float64_bits, on_device_of, register, triton, triton_dtype
from fastmask.kernels.nms.forward import (
    scan_bits_kernel,
    scan_boxes_kernel,
    suppress_later_kernel,
    suppression_bits_kernel,
)
from fastmask.kernels.nms.reference import (
    float32_at_most,
    nms_padded_reference,
    nms_reference,
    taking_part,
)

CHUNK = 4096  # rows of a bit matrix, at most: a power of two, >= 64
BITS = 1 << 28  # bytes for the bit matrices of all segments together, beyond which chunks shrink
FEW = 256  # outputs up to which one launch scans; an estimate, to be measured


def _launch_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    counts: Tensor | None,
    iou_threshold: float,
    score_threshold: float | None,
    max_output: int,
) -> tuple[Tensor, Tensor]:
    batch, num_boxes = scores.shape
    indices = torch.full((batch, max_output), -1, dtype=torch.int64, device=boxes.device)
    if not batch * num_boxes * max_output:
        return indices, torch.zeros(batch, dtype=torch.int64, device=boxes.device)

    valid = taking_part(scores, counts, score_threshold)
    if valid is None:
        considered = torch.full((batch,), num_boxes, dtype=torch.int64, device=boxes.device)
    else:
        considered = valid.sum(1)
        # Valid scores of -inf come with `counts` only, and so with smaller indices than what takes no part.
        scores = scores.masked_fill(~valid, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    boxes = boxes.contiguous()
    classes = None if classes is None else classes.contiguous()
    count = torch.empty_like(considered)

    dtype = compute_dtype(boxes.dtype)
    bits_of = float64_bits(iou_threshold if dtype == torch.float64 else float32_at_most(iou_threshold))
    exact = {"dtype": triton_dtype(dtype), "enable_fp_fusion": False}
    with on_device_of(boxes):
        if max_output <= FEW:
            scan_boxes_kernel[(batch,)](
                *(boxes, classes, order, considered, indices, count),
                *(num_boxes, max_output, bits_of),
                block=32 if dtype == torch.float64 else 64,
                step=16,
                **exact,
                num_warps=16,  # tiles of pairs fit 123 registers then; with 8 warps they spill
            )
            return indices, count

        chunk = min(CHUNK, max(64, 1 << (num_boxes - 1).bit_length()))
        while chunk > 512 and batch * chunk * chunk // 8 > BITS:
            chunk //= 2
        rows, words = min(128, chunk), chunk // 64
        bits = torch.empty(batch, chunk, words, dtype=torch.int64, device=boxes.device)
        before = torch.empty_like(count)
        several = num_boxes > chunk
        removed = torch.zeros(batch, num_boxes if several else 0, dtype=torch.uint8, device=boxes.device)
        for first in range(0, num_boxes, chunk):
            ahead = min(chunk, num_boxes - first)
            suppression_bits_kernel[(batch, triton.cdiv(ahead, rows), triton.cdiv(ahead, 64))](
                *(boxes, classes, order, considered, count, bits),
                *(num_boxes, first, max_output, bits_of),
                words=words,
                rows=rows,
                **exact,
            )
            scan_bits_kernel[(batch,)](
                *(bits, removed, order, considered, indices, before, count),
                *(num_boxes, first, max_output),
                words=words,
                num_warps=8 if words > 8 else 4,
            )
            if first + chunk < num_boxes:
                blocks = triton.cdiv(num_boxes - first - chunk, 64)
                suppress_later_kernel[(batch * blocks,)](
                    *(boxes, classes, order, considered, indices, before, count, removed),
                    *(num_boxes, first + chunk, blocks, max_output, bits_of),
                    rows=64,  # 40 registers, against 103 with 16 columns a step
                    step=4,
                    **exact,
                )
    return indices, count


def _launch_nms(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    classes = None if classes is None else classes[None]
    indices, count = _launch_nms_padded(boxes[None], scores[None], classes, None, iou_threshold, None, len(boxes))
    return indices[0, : int(count)]  # the one wait: the result's length is known on the device only


def _fake_nms_padded(boxes: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, max_output = len(boxes), arguments[-1]
    return boxes.new_empty(batch, max_output, dtype=torch.int64), boxes.new_empty(batch, dtype=torch.int64)


def _fake_nms(boxes: Tensor, *_: Any) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


_nms_padded = register(
    "nms_padded(Tensor boxes, Tensor scores, Tensor? classes, Tensor? counts, float iou_threshold, "
    "float? score_threshold, SymInt max_output) -> (Tensor, Tensor)",
    reference=nms_padded_reference,
    launch=_launch_nms_padded,
    fake=_fake_nms_padded,
)
_nms = register(
    "nms(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold) -> Tensor",
    reference=nms_reference,
    launch=_launch_nms,
    fake=_fake_nms,
)


def _check(boxes: Tensor, dimensions: tuple[str, ...], iou_threshold: float, **others: Tensor | None) -> None:
    """`boxes` have 4 coordinates and `others` one value per box, on the same device."""
    if boxes.ndim != len(dimensions) + 1 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes: expected [{', '.join(dimensions)}, 4], got {list(boxes.shape)}")
    for name, value in (("boxes", boxes), ("scores", others["scores"])):
        if value is not None and not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    for name, value in others.items():
        expected = boxes.shape[:1] if name == "counts" else boxes.shape[:-1]
        if value is not None and value.shape != expected:
            raise ValueError(f"{name}: expected {list(expected)} to match boxes, got {list(value.shape)}")
        if value is not None and value.device != boxes.device:
            raise ValueError(f"{name}: expected on {boxes.device} like boxes, got {value.device}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold: expected in [0, 1], got {iou_threshold}")


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression, as `torchvision.ops.nms`.

    On an accelerator the host waits once, for the number of results; `nms_padded` never waits.

    Args:
        boxes: `[N, 4]`, floating, `(x1, y1, x2, y2)` in any one unit; half precision is computed in float32.
        scores: `[N]`, floating. NaN counts as the highest, as in `torch.sort`.
        iou_threshold: a box is dropped when its IoU with a kept one exceeds this.

    Returns:
        int64 indices of the kept boxes by falling score, ties by rising index.

    Raises:
        ValueError: a shape or device does not match, or `iou_threshold` is outside [0, 1].
        TypeError: `boxes` or `scores` are not floating.
    """
    _check(boxes, ("N",), iou_threshold, scores=scores)
    return _nms(boxes.detach(), scores.detach(), None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` where only boxes of equal `idxs[N]` can suppress each other, as `torchvision.ops.batched_nms`.

    torchvision shifts each class out of the others' reach when boxes are few, which rounds their IoUs; this
    is its exact variant, for any number of boxes. Errors as for `nms`.
    """
    _check(boxes, ("N",), iou_threshold, scores=scores, idxs=idxs)
    return _nms(boxes.detach(), scores.detach(), idxs, iou_threshold)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    *,
    classes: Tensor | None = None,
    counts: Tensor | None = None,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression in B segments at once, with results of fixed shape: the host never waits.

    Args:
        boxes: `[B, N, 4]`, floating, `(x1, y1, x2, y2)` in any one unit; half precision computes in float32.
        scores: `[B, N]`, floating. NaN counts as the highest, but never exceeds a `score_threshold`.
        iou_threshold: in [0, 1]; a box is dropped when its IoU with a kept one exceeds this.
        max_output: results per segment at most; the best are kept.
        classes: `[B, N]`; only boxes of equal class can suppress each other.
        counts: `[B]`, integer; segment b has `counts[b]` boxes, clamped to [0, N], and padding after them.
        score_threshold: only boxes with a score above this take part.

    Returns:
        indices `[B, max_output]` int64 of the kept boxes by falling score, ties by rising index, then -1; and
        how many there are, `[B]` int64.

    Raises:
        ValueError: a shape or device does not match, `iou_threshold` is outside [0, 1], `max_output` < 0.
        TypeError: `boxes` or `scores` are not floating, or `counts` not integer.
    """
    _check(boxes, ("B", "N"), iou_threshold, scores=scores, classes=classes, counts=counts)
    if counts is not None and (counts.is_floating_point() or counts.dtype == torch.bool):
        raise TypeError(f"counts: expected an integer dtype, got {counts.dtype}")
    if max_output < 0:
        raise ValueError(f"max_output: expected >= 0, got {max_output}")
    return _nms_padded(boxes.detach(), scores.detach(), classes, counts, iou_threshold, score_threshold, max_output)
