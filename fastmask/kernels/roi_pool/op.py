"""RoIPool's settings as one type, and its two operators registered with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import Size, empty, is_channels_last, register
from fastmask.kernels.roi_align.levels import thresholds_of
from fastmask.kernels.roi_align.op import PyramidShape, fake_backward, with_shape
from fastmask.kernels.roi_pool.backward import launch_roi_pool_backward
from fastmask.kernels.roi_pool.forward import launch_roi_pool
from fastmask.kernels.roi_pool.reference import gather_winners, roi_pool_backward_reference, roi_pool_reference


class RoIPoolSpec(NamedTuple):
    """All settings of RoIPool, as `multiscale_roi_pool` documents them."""

    pooled_height: Size
    pooled_width: Size
    spatial_scales: Sequence[float]  # a tuple, except in a public function
    canonical_box_size: float = 224.0
    canonical_level: int = 4
    level_rounding: str = "torchvision"

    thresholds = thresholds_of

    def empty_outputs(self, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the output, in the first level's memory format, and for argmax, which is channels_last always."""
        first = features[0]
        shape = (boxes.shape[0], first.shape[1], self.pooled_height, self.pooled_width)
        output = empty(first, shape, is_channels_last(first))
        return output, empty(first, shape, True, torch.int32)


def _fake_roi_pool(features: Sequence[Tensor], boxes: Tensor, spec: RoIPoolSpec) -> tuple[Tensor, Tensor]:
    return spec.empty_outputs(features, boxes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, boxes, ctx.spec = inputs
    _, argmax = output
    ctx.save_for_backward(boxes, argmax)
    ctx.set_materialize_grads(False)  # argmax has none; zeros of its size would be written in each backward
    ctx.sizes = PyramidShape.of(features).pack()
    ctx.channels_last = is_channels_last(features[0])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[list[Tensor] | list[None], None]:
    if grad is None:
        return [None] * len(ctx.needs_input_grad[0]), None
    boxes, argmax = ctx.saved_tensors
    return _roi_pool_backward(grad, boxes, argmax, ctx.sizes, ctx.channels_last, *ctx.spec), None


def _setup_double_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    del output
    _, boxes, argmax, _, _, ctx.spec = inputs
    ctx.save_for_backward(boxes, argmax)


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The backward is linear in its gradient: what a bin added to its winner, it gathers from there."""
    boxes, argmax = ctx.saved_tensors
    return _gather_winners(grads, boxes, argmax, *ctx.spec), None, None, None, None


def _fake_gather(features: Sequence[Tensor], boxes: Tensor, argmax: Tensor, spec: RoIPoolSpec) -> Tensor:
    del boxes, spec
    return empty(features[0], argmax.shape, True)


def _setup_third_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    features, boxes, argmax, ctx.spec = inputs
    ctx.save_for_backward(boxes, argmax)
    ctx.sizes = PyramidShape.of(features).pack()
    ctx.channels_last = is_channels_last(features[0])


def _third_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes, argmax = ctx.saved_tensors
    return _roi_pool_backward(grad, boxes, argmax, ctx.sizes, ctx.channels_last, *ctx.spec), None, None


_gather_winners = register(
    "roi_pool_gather(Tensor[] features, Tensor boxes, Tensor argmax, *spec) -> Tensor",
    reference=gather_winners,
    launch=gather_winners,
    fake=_fake_gather,
    backward=_third_backward,
    setup_context=_setup_third_backward,
    spec=RoIPoolSpec,
)

_roi_pool_backward = register(
    "roi_pool_backward(Tensor grad, Tensor boxes, Tensor argmax, SymInt[] sizes, bool channels_last, *spec)"
    " -> Tensor[]",
    reference=with_shape(roi_pool_backward_reference),
    launch=with_shape(launch_roi_pool_backward),
    fake=with_shape(fake_backward),
    backward=_double_backward,
    setup_context=_setup_double_backward,
    spec=RoIPoolSpec,
)

roi_pool_operator = register(
    "roi_pool(Tensor[] features, Tensor boxes, *spec) -> (Tensor output, Tensor argmax)",
    reference=roi_pool_reference,
    launch=launch_roi_pool,
    fake=_fake_roi_pool,
    backward=_backward,
    setup_context=_setup_context,
    spec=RoIPoolSpec,
)
