"""Mask loss: binary cross-entropy of the mask that each RoI predicts for its own class (He et al. 2017, §3).

    loss = 1 / n * sum over rows r that count and pixels i of  max(x, 0) - x * t + log(1 + exp(-|x|))
    x    = logits[r, labels[r] - 1, i]            t = targets[r, i]            n = pixels of the rows that count
    d loss / d x = (sigmoid(x) - t) / n           and 0 for the other K - 1 masks of a row

R RoIs (rows), K classes, m x m pixels. A row counts if it is valid and has a label in 1..K; masks of other classes do
not compete, which is what decouples masks from classes.

The forward reads one of the K channels of a row where it lies, instead of gathering it. It keeps `sigmoid(x) - t`,
`[R, m, m]`, for the backward, so that the logits are not kept: 32 MB for 256 rows of 80 classes in bfloat16, against
0.8 MB. The backward writes the gradient of all K channels once; autograd of a gather fills it with zeros, adds into it,
and in half precision casts it from float32.
Deterministic: sums of rows, then one sum of them in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._losses import REDUCTIONS, launch_reduce, no_second_derivative, reduce_reference
from fastmask.kernels._runtime import (
    ceil_div,
    compute_dtype,
    empty,
    is_channels_last,
    jit,
    next_power_of_2,
    on_device_of,
    overridable,
    register,
    tl,
    triton_dtype,
)
from fastmask.kernels._validation import MAX_INT32, check_choice, check_same_device, check_tensor, describe

# The pixels of a 28 x 28 mask in one step of four warps. Not yet measured on a GPU.
MAX_PIXELS_PER_STEP = 1024
FORWARD_WARPS = 4

# Four vectors of 16 bytes per thread of the gradient. Not yet measured on a GPU.
VECTORS_PER_PROGRAM = 512
BACKWARD_WARPS = 4


def _rows_that_count(labels: Tensor, valid: Tensor | None, num_classes: int) -> Tensor:
    """Indices of rows, on the CPU.

    Raises:
        ValueError: a valid row has a label outside 0..K.
    """
    used = labels if valid is None else labels.where(valid, 0)
    if wrong := used[(used < 0) | (used > num_classes)].tolist():
        raise ValueError(f"labels: expected 0..{num_classes} in valid rows, got {wrong[0]}")
    return used.nonzero()[:, 0]


def mask_loss_reference(
    logits: Tensor, targets: Tensor, labels: Tensor, valid: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, `sigmoid(x) - t` of all rows, and the factor of its gradient."""
    dtype, rows = compute_dtype(logits.dtype), _rows_that_count(labels, valid, logits.shape[1])
    x, t = logits[rows, labels[rows] - 1].to(dtype), targets[rows].to(dtype)
    total = F.binary_cross_entropy_with_logits(x, t, reduction="sum")
    residuals = torch.zeros(targets.shape, dtype=dtype, device=logits.device)
    residuals[rows] = x.sigmoid_().sub_(t)
    loss, scale = reduce_reference(total, t.numel(), reduction)
    return loss, residuals, scale


def mask_loss_backward_reference(
    grad: Tensor,
    residuals: Tensor,
    labels: Tensor,
    scale: Tensor,
    num_classes: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The gradient of the logits."""
    output = _empty_gradient(residuals, num_classes, dtype, channels_last).zero_()
    channel = (labels - 1).clamp(0, num_classes - 1)
    rows = torch.arange(len(labels), device=labels.device)
    output[rows, channel] = (residuals * (grad * scale)).to(dtype)
    return output


def _empty_gradient(residuals: Tensor, num_classes: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    rows, height, width = residuals.shape
    return empty(residuals, (rows, num_classes, height, width), channels_last, dtype)


@jit()
def _log1p(e, TERMS: tl.constexpr):
    """log(1 + e) for e in [0, 1], by the series 2 * atanh(e / (2 + e)): `tl.log(1 + e)` loses a small e."""
    z = e / (2 + e)
    square = z * z
    series = tl.full(e.shape, 1.0 / (2 * TERMS - 1), e.dtype)
    for i in tl.static_range(TERMS - 1):
        series = tl.fma(series, square, tl.full(e.shape, 1.0 / (2 * TERMS - 3 - 2 * i), e.dtype))
    return 2 * z * series


@jit()
def _mask_loss_kernel(
    logits,  # [R, K, m, m], contiguous or channels_last
    targets,  # [R, m, m]
    labels,  # [R], int64
    valid,  # [R], uint8, or None
    residuals,  # [R, m, m]
    sums,  # [R]
    counts,  # [R], int32
    K: tl.constexpr,
    PIXELS: tl.constexpr,  # m * m
    CHANNELS_LAST: tl.constexpr,
    STEP: tl.constexpr,  # pixels
    COMPUTE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counted = (label >= 1) & (label <= K)
    if valid is not None:
        counted &= tl.load(valid + row) != 0
    channel = tl.where(counted, label - 1, 0)
    STRIDE: tl.constexpr = K if CHANNELS_LAST else 1
    logits += row * (K * PIXELS) + (channel if CHANNELS_LAST else channel * PIXELS)
    targets += row * PIXELS
    residuals += row * PIXELS
    TERMS: tl.constexpr = (
        8 if COMPUTE.primitive_bitwidth == 32 else 17
    )  # the next term is below half an ulp: z <= 1 / 3

    total = tl.zeros((STEP,), COMPUTE)
    for start in range(0, PIXELS, STEP):
        pixel = start + tl.arange(0, STEP)
        read = (pixel < PIXELS) & counted
        x = tl.load(logits + pixel * STRIDE, mask=read, other=0.0).to(COMPUTE)
        t = tl.load(targets + pixel, mask=read, other=0).to(COMPUTE)
        e = tl.exp(-tl.abs(x))
        loss = tl.maximum(x, 0.0) - x * t + _log1p(e, TERMS)
        total += tl.where(read, loss, 0.0)
        sigmoid = tl.where(x >= 0, 1.0, e) / (1 + e)
        tl.store(residuals + pixel, tl.where(read, sigmoid - t, 0.0), mask=pixel < PIXELS)
    tl.store(sums + row, tl.sum(total, 0))
    tl.store(counts + row, tl.where(counted, PIXELS, 0))


@jit()
def _mask_loss_backward_kernel(
    grad,  # one element
    scale,  # one element
    residuals,  # [R, m, m]
    labels,  # [R], int64
    output,  # [R, K, m, m], contiguous or channels_last
    K: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PROGRAMS: tl.constexpr,  # of a row
    VECTORS: tl.constexpr,  # of a program
    PER_VECTOR: tl.constexpr,  # elements of 16 bytes, or fewer where K is smaller
):
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    program = tl.program_id(0) % PROGRAMS
    factor = tl.load(grad) * tl.load(scale)
    channel = tl.minimum(tl.maximum(tl.load(labels + row) - 1, 0), K - 1).to(tl.int32)
    residuals += row * PIXELS
    first = (program * VECTORS + tl.arange(0, VECTORS)) * PER_VECTOR  # in the memory of the row
    element = tl.arange(0, PER_VECTOR)[None, :]
    if CHANNELS_LAST:
        # A vector is no longer than the K channels of a pixel: it holds the row's class of one pixel at most.
        pixel = (first + (K - 1) - channel) // K  # the first pixel of which it may
        place = pixel * K + channel - first
        value = tl.load(residuals + pixel, mask=(place < PER_VECTOR) & (pixel < PIXELS), other=0.0)
        value = tl.where(element == place[:, None], (value * factor)[:, None], 0.0)
    else:
        pixel = first[:, None] + element - channel * PIXELS
        value = tl.load(residuals + pixel, mask=(pixel >= 0) & (pixel < PIXELS), other=0.0) * factor
    offset = first[:, None] + element
    output += row * (K * PIXELS)
    tl.store(output + offset, value.to(output.dtype.element_ty), mask=offset < K * PIXELS)


@lru_cache(maxsize=256)
def _prepared(num_classes: int, pixels: int, channels_last: bool, dtype: torch.dtype) -> Launch:
    return Launch(
        _mask_loss_kernel,
        K=num_classes,
        PIXELS=pixels,
        CHANNELS_LAST=channels_last,
        STEP=min(next_power_of_2(pixels), MAX_PIXELS_PER_STEP),
        COMPUTE=triton_dtype(dtype),
        num_warps=FORWARD_WARPS,
    )


@lru_cache(maxsize=256)
def _prepared_backward(num_classes: int, pixels: int, channels_last: bool, dtype: torch.dtype) -> tuple[int, Launch]:
    """The number of programs for each row, and the launch."""
    per_vector = 16 // dtype.itemsize
    while channels_last and per_vector > num_classes:
        per_vector //= 2
    programs = ceil_div(num_classes * pixels, VECTORS_PER_PROGRAM * per_vector)
    return programs, Launch(
        _mask_loss_backward_kernel,
        K=num_classes,
        PIXELS=pixels,
        CHANNELS_LAST=channels_last,
        PROGRAMS=programs,
        VECTORS=VECTORS_PER_PROGRAM,
        PER_VECTOR=per_vector,
        num_warps=BACKWARD_WARPS,
    )


def _launch_mask_loss(
    logits: Tensor, targets: Tensor, labels: Tensor, valid: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, num_classes, height, width = logits.shape
    dtype, channels_last = compute_dtype(logits.dtype), is_channels_last(logits)
    sums = torch.empty(rows, dtype=dtype, device=logits.device)
    counts = torch.empty(rows, dtype=torch.int32, device=logits.device)
    residuals = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    targets = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
    with on_device_of(logits):
        if residuals.numel():
            _prepared(num_classes, height * width, channels_last, logits.dtype)(
                (rows,),
                logits if channels_last else logits.contiguous(),
                targets.contiguous(),
                labels.contiguous(),
                None if valid is None else valid.contiguous().view(torch.uint8),
                residuals,
                sums,
                counts,
            )
        else:
            sums.zero_()
            counts.zero_()
        loss, scale = launch_reduce(sums, counts, reduction)
    return loss, residuals, scale


def _launch_mask_loss_backward(
    grad: Tensor,
    residuals: Tensor,
    labels: Tensor,
    scale: Tensor,
    num_classes: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    output = _empty_gradient(residuals, num_classes, dtype, channels_last)
    rows, height, width = residuals.shape
    if output.numel():
        programs, launch = _prepared_backward(num_classes, height * width, channels_last, dtype)
        with on_device_of(output):
            launch((rows * programs,), grad, scale, residuals.contiguous(), labels.contiguous(), output)
    return output


def _fake_mask_loss(
    logits: Tensor, targets: Tensor, labels: Tensor, valid: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    del labels, valid, reduction
    shapes = ((), targets.shape, ())
    loss, residuals, scale = (logits.new_empty(shape, dtype=compute_dtype(logits.dtype)) for shape in shapes)
    return loss, residuals, scale


def _fake_mask_loss_backward(
    grad: Tensor,
    residuals: Tensor,
    labels: Tensor,
    scale: Tensor,
    num_classes: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    del grad, labels, scale
    return _empty_gradient(residuals, num_classes, dtype, channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, labels, _, _ = inputs
    _, residuals, scale = output
    ctx.mark_non_differentiable(scale)  # but not the residuals: a second derivative through them raises
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residuals, labels, scale)
    ctx.num_classes, ctx.dtype, ctx.channels_last = logits.shape[1], logits.dtype, is_channels_last(logits)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    residuals, labels, scale = ctx.saved_tensors
    settings = ctx.num_classes, ctx.dtype, ctx.channels_last
    return _mask_loss_backward(grad, residuals, labels, scale, *settings), None, None, None, None


_mask_loss_backward = register(
    "mask_loss_backward(Tensor grad, Tensor residuals, Tensor labels, Tensor scale, SymInt num_classes,"
    " ScalarType dtype, bool channels_last) -> Tensor",
    reference=mask_loss_backward_reference,
    launch=_launch_mask_loss_backward,
    fake=_fake_mask_loss_backward,
    backward=no_second_derivative,
)

_mask_loss = register(
    "mask_loss(Tensor logits, Tensor targets, Tensor labels, Tensor? valid, str reduction)"
    " -> (Tensor loss, Tensor residuals, Tensor scale)",
    reference=mask_loss_reference,
    launch=_launch_mask_loss,
    fake=_fake_mask_loss,
    backward=_backward,
    setup_context=_setup_context,
)


@overridable
def mask_loss(
    logits: Tensor, targets: Tensor, labels: Tensor, valid: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """Binary cross-entropy of the mask of each row's class; masks of other classes do not contribute.

    Args:
        logits: `[R, K, m, m]`, floating. channels_last is fastest.
        targets: `[R, m, m]` in 0..1, floating, integer or bool. They receive no gradient.
        labels: `[R]`, integer, the class of each row, 1..K: class k is channel k - 1. 0 marks an empty slot.
        valid: `[R]`, bool, the rows that count; by default all. A row without a class in 1..K never counts.
        reduction: `"mean"` over the pixels of the rows that count, or their `"sum"`, for a normaliser of your own.

    Returns:
        Scalar, float32 (float64 for float64 logits); 0 if no row counts. Differentiable once with respect to the
        logits; the gradient is in their dtype and memory format. Forward and backward are deterministic.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or device, `reduction` is unknown, or a row of the logits has 2^31
            elements or more. A label outside 0..K in a valid row raises on the CPU only: on an accelerator this check
            would need a host-device synchronisation, and such a row does not count.
        NotImplementedError: in a backward, for a second derivative.

    Source: He et al. 2017, Mask R-CNN, §3.
    """
    check_tensor("logits", logits, floating=True)
    check_tensor("targets", targets, real=True)
    check_tensor("labels", labels, integer=True)
    if logits.ndim != 4 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected [R, K, m, m], got {list(logits.shape)}")
    rows, num_classes, height, width = logits.shape
    if num_classes * height * width > MAX_INT32:
        raise ValueError(f"logits: expected fewer than 2^31 elements in a row, got {list(logits.shape)}")
    if targets.shape != (rows, height, width):
        raise ValueError(f"targets: expected {[rows, height, width]} to match logits, got {list(targets.shape)}")
    check_same_device("targets", targets, "logits", logits)
    _check_rows("labels", labels, logits)
    if valid is not None:
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            raise TypeError(f"valid: expected a Tensor of torch.bool, got {describe(valid)}")
        check_tensor("valid", valid)
        _check_rows("valid", valid, logits)
    reduction = check_choice("reduction", reduction, REDUCTIONS)
    loss, _, _ = _mask_loss(logits, targets.detach(), labels.long(), valid, reduction)
    return loss


def _check_rows(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.shape != (logits.shape[0],):
        raise ValueError(f"{name}: expected [{logits.shape[0]}] to match logits, got {list(tensor.shape)}")
    check_same_device(name, tensor, "logits", logits)
