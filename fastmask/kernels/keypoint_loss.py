"""Keypoint loss: the cross-entropy of each keypoint's pixel, under a softmax over its heatmap (He et al. 2017, §5).

    loss = 1 / n * sum over the n keypoints with a target of  lse[r, p] - x[r, p, target]
    lse[r, p] = log(sum over pixels i of exp(x[r, p, i]))            x = heatmaps
    d loss / d x[r, p, i] = (exp(x[r, p, i] - lse[r, p]) - [i is the target]) / n      0 where there is no target

R RoIs, P keypoints, m x m pixels. A target is a pixel, row * m + column, or -1 where a keypoint has none.

Forward and backward read the heatmaps once each, where they lie (contiguous ones without a target not at all); beside
them, lse is kept between the two, `[R, P]`. `F.cross_entropy` first makes channels_last heatmaps contiguous, and writes
and keeps their log-softmax, which is as large.
Deterministic: a heatmap is summed in a fixed order, then the keypoints of a row, then the rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._losses import REDUCTIONS, launch_reduce, no_second_derivative, reduce_reference
from fastmask.kernels._runtime import (
    ceil_div,
    compute_dtype,
    is_channels_last,
    jit,
    next_power_of_2,
    on_device_of,
    overridable,
    register,
    tl,
    triton_dtype,
)
from fastmask.kernels._validation import MAX_INT32, check_choice, check_same_device, check_tensor

# Elements of a step. The forward takes a heatmap (contiguous) or the heatmaps of a row (channels_last) in one program:
# 8 or 16 elements per thread are in flight. Not yet measured on a GPU.
ELEMENTS = 4096
CONTIGUOUS_WARPS = 8
CHANNELS_LAST_WARPS = 16
BACKWARD_ELEMENTS = 1024
BACKWARD_WARPS = 4
LEAST = -3e38  # below every logit: the largest logit of no pixels


def _with_target(targets: Tensor, pixels: int) -> Tensor:
    """`[R, P]`, on the CPU.

    Raises:
        ValueError: a target is outside -1..m * m - 1.
    """
    if wrong := targets[(targets < -1) | (targets >= pixels)].tolist():
        raise ValueError(f"targets: expected -1..{pixels - 1}, got {wrong[0]}")
    return targets >= 0


def _logits_of(heatmaps: Tensor, chosen: Tensor) -> Tensor:
    """The pixels `[n, m * m]` of the n chosen heatmaps."""
    if heatmaps.is_contiguous():  # several times as fast as indexing by a mask
        return heatmaps.flatten(0, 1).flatten(1).index_select(0, chosen.flatten().nonzero()[:, 0])
    return heatmaps.flatten(2)[chosen]


def keypoint_loss_reference(heatmaps: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the log of the sum of exponentials of each heatmap, and the factor of the gradient."""
    dtype = compute_dtype(heatmaps.dtype)
    chosen = _with_target(targets, heatmaps.shape[2] * heatmaps.shape[3])
    logits, at = _logits_of(heatmaps, chosen).to(dtype), targets[chosen, None]
    lse = torch.zeros(targets.shape, dtype=dtype, device=heatmaps.device)
    lse[chosen] = of_chosen = logits.logsumexp(1)
    loss, scale = reduce_reference((of_chosen - logits.gather(1, at)[:, 0]).sum(), len(at), reduction)
    return loss, lse, scale


def keypoint_loss_backward_reference(
    grad: Tensor, heatmaps: Tensor, targets: Tensor, lse: Tensor, scale: Tensor
) -> Tensor:
    """The gradient of the heatmaps."""
    chosen = targets >= 0
    output = _empty_gradient(heatmaps).zero_()
    gradient = _logits_of(heatmaps, chosen).to(lse.dtype).sub_(lse[chosen, None]).exp_()
    gradient.scatter_add_(1, targets[chosen, None], gradient.new_full((1, 1), -1.0).expand(len(gradient), 1))
    output.flatten(2)[chosen] = gradient.mul_(grad * scale).to(heatmaps.dtype)
    return output


def _empty_gradient(heatmaps: Tensor) -> Tensor:
    layout = torch.channels_last if is_channels_last(heatmaps) else torch.contiguous_format
    return torch.empty_like(heatmaps, memory_format=layout)


@jit()
def _keypoint_loss_kernel(
    heatmaps,  # [R, P, m, m], contiguous or channels_last
    targets,  # [R, P], int64
    lse,  # [R, P]
    sums,  # [programs]
    counts,  # [programs], int32
    P: tl.constexpr,  # heatmaps of a program: those of a row where they are channels_last, else one
    PIXELS: tl.constexpr,  # m * m
    POINTS: tl.constexpr,  # P rounded up to a power of two
    STEP: tl.constexpr,  # pixels
    COMPUTE: tl.constexpr,
    LEAST: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    point = tl.arange(0, POINTS)
    heatmaps += program * (P * PIXELS)
    target = tl.load(targets + program * P + point, mask=point < P, other=-1)
    chosen = (target >= 0) & (target < PIXELS)
    # Each element of the tile has its own largest logit and sum: nothing is exchanged between threads in the loop.
    largest = tl.full((STEP, POINTS), LEAST, COMPUTE)
    total = tl.zeros((STEP, POINTS), COMPUTE)
    for start in range(0, PIXELS, STEP):
        pixel = start + tl.arange(0, STEP)
        read = (pixel < PIXELS)[:, None] & chosen[None, :]
        offset = pixel[:, None] * P + point[None, :]
        x = tl.load(heatmaps + offset, mask=read, other=-float("inf")).to(COMPUTE)
        before, largest = largest, tl.maximum(largest, x)
        total = total * tl.exp(before - largest) + tl.exp(x - largest)
    of_point = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - of_point[None, :]), 0)
    # total is 1 or more, unless all logits are -inf.
    value = tl.where(chosen, of_point + tl.log(total), 0.0)
    at_target = tl.load(heatmaps + target * P + point, mask=chosen, other=0.0).to(COMPUTE)
    tl.store(lse + program * P + point, value, mask=point < P)
    tl.store(sums + program, tl.sum(value - at_target, 0))
    tl.store(counts + program, tl.sum(chosen.to(tl.int32), 0))


@jit()
def _keypoint_loss_backward_kernel(
    grad,  # one element
    heatmaps,  # [R, P, m, m], contiguous or channels_last
    targets,  # [R, P], int64
    lse,  # [R, P]
    scale,  # one element
    output,  # [R, P, m, m]
    P: tl.constexpr,
    PIXELS: tl.constexpr,
    PROGRAMS: tl.constexpr,  # of a row, or of a heatmap
    ELEMENTS: tl.constexpr,  # of a program
):
    # In the order of memory: a tile of [pixels x 32] would be idle in 15 of 32 columns of 17 keypoints.
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    element = (tl.program_id(0) % PROGRAMS) * ELEMENTS + tl.arange(0, ELEMENTS)
    pixel = element // P
    point = element - pixel * P
    inside = element < P * PIXELS
    target = tl.load(targets + row * P + point)
    chosen = (target >= 0) & (target < PIXELS)
    of_point = tl.load(lse + row * P + point)
    factor = tl.load(grad) * tl.load(scale)
    offset = row * (P * PIXELS) + element
    read = inside if P > 1 else inside & chosen  # channels_last: a vector has several keypoints
    x = tl.load(heatmaps + offset, mask=read, other=0.0).to(of_point.dtype)
    gradient = (tl.exp(x - of_point) - tl.where(pixel == target, 1.0, 0.0)) * factor
    tl.store(output + offset, tl.where(chosen, gradient, 0.0).to(output.dtype.element_ty), mask=inside)


@lru_cache(maxsize=64)
def _prepared(points: int, pixels: int, dtype: torch.dtype) -> Launch:
    columns = next_power_of_2(points)
    return Launch(
        _keypoint_loss_kernel,
        P=points,
        PIXELS=pixels,
        POINTS=columns,
        STEP=min(next_power_of_2(pixels), max(ELEMENTS // columns, 1)),
        COMPUTE=triton_dtype(dtype),
        LEAST=LEAST,
        num_warps=CONTIGUOUS_WARPS if points == 1 else CHANNELS_LAST_WARPS,
    )


@lru_cache(maxsize=64)
def _prepared_backward(points: int, pixels: int) -> tuple[int, Launch]:
    """The number of programs for each row or heatmap, and the launch."""
    programs = ceil_div(points * pixels, BACKWARD_ELEMENTS)
    return programs, Launch(
        _keypoint_loss_backward_kernel,
        P=points,
        PIXELS=pixels,
        PROGRAMS=programs,
        ELEMENTS=BACKWARD_ELEMENTS,
        num_warps=BACKWARD_WARPS,
    )


def _in_layout(heatmaps: Tensor) -> tuple[Tensor, int, int]:
    """Heatmaps that kernels read, how many have their pixels interleaved, and how many such groups there are."""
    rows, points = heatmaps.shape[:2]
    if is_channels_last(heatmaps):
        return heatmaps, points, rows
    return heatmaps.contiguous(), 1, rows * points


def _launch_keypoint_loss(heatmaps: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(heatmaps.dtype)
    heatmaps, points, programs = _in_layout(heatmaps)
    lse = torch.empty(targets.shape, dtype=dtype, device=heatmaps.device)
    sums, counts = lse.new_empty(programs), lse.new_empty(programs, dtype=torch.int32)
    with on_device_of(heatmaps):
        if programs:
            launch = _prepared(points, heatmaps.shape[2] * heatmaps.shape[3], heatmaps.dtype)
            launch((programs,), heatmaps, targets.contiguous(), lse, sums, counts)
        loss, scale = launch_reduce(sums, counts, reduction)
    return loss, lse, scale


def _launch_keypoint_loss_backward(
    grad: Tensor, heatmaps: Tensor, targets: Tensor, lse: Tensor, scale: Tensor
) -> Tensor:
    output = _empty_gradient(heatmaps)
    if output.numel():
        heatmaps, points, groups = _in_layout(heatmaps)
        programs, launch = _prepared_backward(points, heatmaps.shape[2] * heatmaps.shape[3])
        with on_device_of(heatmaps):
            launch((groups * programs,), grad, heatmaps, targets.contiguous(), lse.contiguous(), scale, output)
    return output


def _fake_keypoint_loss(heatmaps: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    del reduction
    dtype = compute_dtype(heatmaps.dtype)
    loss, lse, scale = (heatmaps.new_empty(shape, dtype=dtype) for shape in ((), targets.shape, ()))
    return loss, lse, scale


def _fake_keypoint_loss_backward(grad: Tensor, heatmaps: Tensor, targets: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    del grad, targets, lse, scale
    return _empty_gradient(heatmaps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    heatmaps, targets, _ = inputs
    _, lse, scale = output
    ctx.mark_non_differentiable(lse, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(heatmaps, targets, lse, scale)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    return _keypoint_loss_backward(grad, *ctx.saved_tensors), None, None


_keypoint_loss_backward = register(
    "keypoint_loss_backward(Tensor grad, Tensor heatmaps, Tensor targets, Tensor lse, Tensor scale) -> Tensor",
    reference=keypoint_loss_backward_reference,
    launch=_launch_keypoint_loss_backward,
    fake=_fake_keypoint_loss_backward,
    backward=no_second_derivative,
)

_keypoint_loss = register(
    "keypoint_loss(Tensor heatmaps, Tensor targets, str reduction) -> (Tensor loss, Tensor lse, Tensor scale)",
    reference=keypoint_loss_reference,
    launch=_launch_keypoint_loss,
    fake=_fake_keypoint_loss,
    backward=_backward,
    setup_context=_setup_context,
)


@overridable
def keypoint_loss(heatmaps: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each keypoint's pixel, under a softmax over the pixels of its heatmap.

    Args:
        heatmaps: `[R, P, m, m]` logits, floating.
        targets: `[R, P]`, integer, the pixel of each keypoint: row * m + column. -1 marks a keypoint without a target,
            which does not contribute.
        reduction: `"mean"` over the keypoints with a target, or their `"sum"`, for a normaliser of your own.

    Returns:
        Scalar, float32 (float64 for float64 heatmaps); 0 if no keypoint has a target. Differentiable once with respect
        to the heatmaps; the gradient is in their dtype and memory format. Forward and backward are deterministic.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or device, `reduction` is unknown, or the heatmaps of a row have
            2^31 elements or more. A target outside -1..m * m - 1 raises on the CPU only: on an accelerator this check
            would need a host-device synchronisation, and such a keypoint does not contribute.
        NotImplementedError: in a backward, for a second derivative.

    Source: He et al. 2017, Mask R-CNN, §5.
    """
    check_tensor("heatmaps", heatmaps, floating=True)
    check_tensor("targets", targets, integer=True)
    if heatmaps.ndim != 4 or 0 in heatmaps.shape[1:]:
        raise ValueError(f"heatmaps: expected [R, P, m, m] with P and m at least 1, got {list(heatmaps.shape)}")
    rows, points, height, width = heatmaps.shape
    if points * height * width > MAX_INT32:
        raise ValueError(f"heatmaps: expected fewer than 2^31 elements in a row, got {list(heatmaps.shape)}")
    if targets.shape != (rows, points):
        raise ValueError(f"targets: expected {[rows, points]} to match heatmaps, got {list(targets.shape)}")
    check_same_device("targets", targets, "heatmaps", heatmaps)
    reduction = check_choice("reduction", reduction, REDUCTIONS)
    loss, _, _ = _keypoint_loss(heatmaps, targets.long(), reduction)
    return loss
