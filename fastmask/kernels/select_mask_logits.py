"""The mask head's last layer at inference: logits of each RoI's predicted class only (He et al. 2017, §3, figure 4).

    output[r, y, x] = bias[k] + sum over channels c of weight[k, c] * features[r, c, y, x]        k = labels[r] - 1

R RoIs, C channels, K classes, h x w pixels. With `relu`, max(features, 0) takes the place of features.

The layer is a 1x1 convolution to K channels, of which the k-th is used. Computing it alone replaces C x K products per
pixel by C, and neither writes nor reads K channels: 25 MB for 100 RoIs of 28 x 28 and 80 classes in bfloat16. What
remains is to read the features once. `relu` saves the pass of the preceding ReLU, which reads and writes them: 80 MB.
RoIs without a class, the empty slots of a padded batch, are not read.
Deterministic: channels are summed in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
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
from fastmask.kernels._validation import MAX_INT32, check_flag, check_same_device, check_tensor

# A step is [pixels x 128 bytes of channels]: a line of each pixel where features are channels_last, 64 bytes of each
# thread in flight. Not yet measured on a GPU.
PIXELS_PER_PROGRAM = 64
CHANNEL_BYTES = 128
NUM_WARPS = 4

# Features that the reference converts, or applies the ReLU to, at a time: they stay in a CPU's cache.
REFERENCE_ELEMENTS = 1 << 18


def select_mask_logits_reference(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, relu: bool) -> Tensor:
    """A matrix-vector product for each RoI."""
    count, channels, height, width = features.shape
    dtype, num_classes = compute_dtype(features.dtype), len(weight)
    if wrong := labels[(labels < 0) | (labels > num_classes)].tolist():
        raise ValueError(f"labels: expected 0..{num_classes}, got {wrong[0]}")
    output = torch.zeros(count, height, width, dtype=dtype, device=features.device)
    with_class = labels.nonzero()[:, 0]
    weight, bias = weight.to(dtype), bias.to(dtype)
    channels_last = is_channels_last(features)
    rows_at_a_time = max(1, REFERENCE_ELEMENTS // max(1, channels * height * width))
    for rows in with_class.split(rows_at_a_time) if len(with_class) else ():
        k = labels[rows] - 1
        # Consecutive rows are a view.
        first, last = int(rows[0]), int(rows[-1]) + 1
        x = features[first:last] if last - first == len(rows) else features[rows]
        x = x.to(dtype).relu() if relu else x.to(dtype)
        if channels_last:
            x = x.permute(0, 2, 3, 1).flatten(1, 2)
            product = torch.bmm(x, weight[k, :, None])[:, :, 0]
        else:
            product = torch.bmm(weight[k, None], x.flatten(2))[:, 0]
        output[rows] = (product + bias[k, None]).unflatten(1, (height, width))
    return output


@jit()
def _select_mask_logits_kernel(
    features,  # [R, C, h, w], contiguous or channels_last
    weight,  # [K, C]
    bias,  # [K]
    labels,  # [R], int64
    output,  # [R, h, w]
    C: tl.constexpr,
    K: tl.constexpr,
    PIXELS: tl.constexpr,  # h * w
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    PROGRAMS: tl.constexpr,  # of a RoI
    STEP_PIXELS: tl.constexpr,
    STEP_CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    pixel = (tl.program_id(0) % PROGRAMS) * STEP_PIXELS + tl.arange(0, STEP_PIXELS)
    inside = pixel < PIXELS
    label = tl.load(labels + row)
    output += row * PIXELS
    if (label >= 1) & (label <= K):
        features += row * (C * PIXELS)
        weight += (label - 1) * C
        total = tl.zeros((STEP_PIXELS, STEP_CHANNELS), COMPUTE)
        for start in range(0, C, STEP_CHANNELS):
            channel = start + tl.arange(0, STEP_CHANNELS)
            read = inside[:, None] if C % STEP_CHANNELS == 0 else inside[:, None] & (channel < C)[None, :]
            if CHANNELS_LAST:
                offset = pixel[:, None] * C + channel[None, :]
            else:
                offset = channel[None, :] * PIXELS + pixel[:, None]
            x = tl.load(features + offset, mask=read, other=0.0).to(COMPUTE)
            if RELU:
                x = tl.where(x < 0, 0.0, x)  # keeps NaN
            w = tl.load(weight + channel, mask=channel < C, other=0.0).to(COMPUTE)
            total = tl.fma(x, tl.broadcast_to(w[None, :], (STEP_PIXELS, STEP_CHANNELS)), total)
        logits = tl.sum(total, 1) + tl.load(bias + label - 1).to(COMPUTE)
        tl.store(output + pixel, logits, mask=inside)
    else:
        tl.store(output + pixel, tl.zeros((STEP_PIXELS,), COMPUTE), mask=inside)


@lru_cache(maxsize=256)
def _prepared(
    channels: int, num_classes: int, pixels: int, channels_last: bool, relu: bool, dtype: torch.dtype
) -> tuple[int, Launch]:
    """The number of programs for each RoI, and the launch."""
    programs = ceil_div(pixels, PIXELS_PER_PROGRAM)
    return programs, Launch(
        _select_mask_logits_kernel,
        C=channels,
        K=num_classes,
        PIXELS=pixels,
        CHANNELS_LAST=channels_last,
        RELU=relu,
        PROGRAMS=programs,
        STEP_PIXELS=PIXELS_PER_PROGRAM,
        STEP_CHANNELS=min(next_power_of_2(channels), CHANNEL_BYTES // dtype.itemsize),
        COMPUTE=triton_dtype(dtype),
        num_warps=NUM_WARPS,
    )


def _launch_select_mask_logits(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, relu: bool) -> Tensor:
    count, channels, height, width = features.shape
    dtype, channels_last = compute_dtype(features.dtype), is_channels_last(features)
    output = torch.empty((count, height, width), dtype=dtype, device=features.device)
    if output.numel():
        settings = channels, weight.shape[0], height * width, channels_last, relu, features.dtype
        programs, launch = _prepared(*settings)
        features = features if channels_last else features.contiguous()
        with on_device_of(features):
            launch(
                (count * programs,),
                features,
                weight.contiguous(),
                bias.contiguous(),
                labels.contiguous(),
                output,
            )
    return output


def _fake_select_mask_logits(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, relu: bool) -> Tensor:
    del weight, bias, labels, relu
    count, _, height, width = features.shape
    return features.new_empty((count, height, width), dtype=compute_dtype(features.dtype))


def _no_derivative(ctx: Any, grad: Tensor) -> NoReturn:
    del ctx, grad
    raise NotImplementedError("select_mask_logits: expected inference, got a backward; train with a 1x1 convolution")


_select_mask_logits = register(
    "select_mask_logits(Tensor features, Tensor weight, Tensor bias, Tensor labels, bool relu) -> Tensor",
    reference=select_mask_logits_reference,
    launch=_launch_select_mask_logits,
    fake=_fake_select_mask_logits,
    backward=_no_derivative,
)


@overridable
def select_mask_logits(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *, relu: bool = False) -> Tensor:
    """A 1x1 convolution to K mask logits per pixel, of which only each RoI's class is computed. For inference.

    Args:
        features: `[R, C, h, w]`, floating. channels_last is fastest.
        weight: `[K, C]` or `[K, C, 1, 1]`, floating: that of the convolution.
        bias: `[K]`, floating.
        labels: `[R]`, integer, the class of each RoI, 1..K: class k is channel k - 1 of the convolution. 0 marks an
            empty slot, whose logits are 0.
        relu: apply a ReLU to the features first.

    Returns:
        `[R, h, w]` logits, float32 (float64 for float64 features), also for features in half precision.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or device, or a RoI has 2^31 features or more. A label outside 0..K
            raises on the CPU only: on an accelerator this check would need a host-device synchronisation, and such a
            RoI has logits of 0.
        NotImplementedError: in a backward. The loss of training needs `mask_loss` after a convolution.

    Source: He et al. 2017, Mask R-CNN, §3, Mask Representation and figure 4.
    """
    check_tensor("features", features, floating=True)
    check_tensor("weight", weight, floating=True)
    check_tensor("bias", bias, floating=True)
    check_tensor("labels", labels, integer=True)
    if features.ndim != 4 or features.shape[1] == 0:
        raise ValueError(f"features: expected [R, C, h, w], got {list(features.shape)}")
    count, channels, height, width = features.shape
    if channels * height * width > MAX_INT32:
        raise ValueError(f"features: expected fewer than 2^31 elements in a RoI, got {list(features.shape)}")
    if weight.ndim not in (2, 4) or weight.shape[1:] not in ((channels,), (channels, 1, 1)) or weight.shape[0] == 0:
        raise ValueError(f"weight: expected [K, {channels}] to match features, got {list(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}] to match weight, got {list(bias.shape)}")
    if labels.shape != (count,):
        raise ValueError(f"labels: expected [{count}] to match features, got {list(labels.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        check_same_device(name, tensor, "features", features)
    return _select_mask_logits(features, weight.flatten(1), bias, labels.long(), check_flag("relu", relu))
