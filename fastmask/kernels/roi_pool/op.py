"""RoIPool's settings as one type, and its two operators registered with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import Size, empty, is_channels_last, register
from fastmask.kernels.roi_pool.backward import launch_roi_pool_backward
from fastmask.kernels.roi_pool.forward import launch_roi_pool
from fastmask.kernels.roi_pool.reference import gather_winners, roi_pool_backward_reference, roi_pool_reference


class RoIPoolSpec(NamedTuple):
    """All settings of RoIPool, as `roi_pool` documents them."""

    pooled_height: Size
    pooled_width: Size
    spatial_scale: float

    def empty_outputs(self, input: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the output, in the input's memory format, and for argmax, which is channels_last always."""
        shape = (boxes.shape[0], input.shape[1], self.pooled_height, self.pooled_width)
        output = empty(input, shape, is_channels_last(input))
        return output, empty(input, shape, True, torch.int32)


def _fake_roi_pool(input: Tensor, boxes: Tensor, spec: RoIPoolSpec) -> tuple[Tensor, Tensor]:
    return spec.empty_outputs(input, boxes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, boxes, ctx.spec = inputs
    _, argmax = output
    ctx.save_for_backward(boxes, argmax)
    ctx.size = input.shape
    ctx.channels_last = is_channels_last(input)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    boxes, argmax = ctx.saved_tensors
    return _roi_pool_backward(grad, boxes, argmax, ctx.size, ctx.channels_last, *ctx.spec), None


def _fake_backward(
    grad: Tensor, boxes: Tensor, argmax: Tensor, size: Sequence[int], channels_last: bool, spec: RoIPoolSpec
) -> Tensor:
    del boxes, argmax, spec
    return empty(grad, size, channels_last)


def _setup_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, boxes, argmax, _, _, _ = inputs
    ctx.save_for_backward(boxes, argmax)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward is linear in its gradient: what a bin added to its winner, it gathers from there."""
    boxes, argmax = ctx.saved_tensors
    return gather_winners(grad, boxes, argmax), None, None, None, None


_roi_pool_backward = register(
    "roi_pool_backward(Tensor grad, Tensor boxes, Tensor argmax, SymInt[] size, bool channels_last, *spec) -> Tensor",
    reference=roi_pool_backward_reference,
    launch=launch_roi_pool_backward,
    fake=_fake_backward,
    backward=_double_backward,
    setup_context=_setup_double_backward,
    spec=RoIPoolSpec,
)

roi_pool_operator = register(
    "roi_pool(Tensor input, Tensor boxes, *spec) -> (Tensor output, Tensor argmax)",
    reference=roi_pool_reference,
    launch=launch_roi_pool,
    fake=_fake_roi_pool,
    backward=_backward,
    setup_context=_setup_context,
    spec=RoIPoolSpec,
)
