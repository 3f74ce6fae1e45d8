"""RoIAlign's settings as one type, and its operators registered with PyTorch: the forward and its two gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import Size, empty, is_channels_last, register
from fastmask.kernels.roi_align.backward import launch_roi_align_backward
from fastmask.kernels.roi_align.box_gradient import launch_roi_align_box_backward
from fastmask.kernels.roi_align.box_gradient_reference import roi_align_box_backward_reference
from fastmask.kernels.roi_align.forward import launch_roi_align
from fastmask.kernels.roi_align.levels import PyramidSpec, rule_of, thresholds_of
from fastmask.kernels.roi_align.reference import roi_align_backward_reference, roi_align_reference


class RoIAlignSpec(NamedTuple):
    """All settings of RoIAlign, as `multiscale_roi_align` documents them."""

    pooled_height: Size
    pooled_width: Size
    spatial_scales: Sequence[float]  # a tuple, except in a public function
    sampling_ratio: int
    aligned: bool
    reduction: str
    canonical_box_size: float = 224.0
    canonical_level: int = 4
    level_rounding: str = "torchvision"

    rule = property(rule_of)
    thresholds = thresholds_of

    def empty_outputs(self, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the output, in the format of the first level, and for the maximum's argmax."""
        first = features[0]
        shape = (boxes.shape[0], first.shape[1], self.pooled_height, self.pooled_width)
        channels_last = is_channels_last(first)
        output = empty(first, shape, channels_last)
        if self.reduction == "max":
            return output, empty(first, shape, channels_last, torch.int32)
        return output, empty(first, (0, 0, 0, 0), True, torch.int32)  # in the format that backwards read


class PyramidShape(NamedTuple):
    """The number of images and `(height, width)` of each level, which the backward operator takes as `sizes`."""

    num_images: int
    levels: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, features: Sequence[Tensor]) -> PyramidShape:
        return cls(features[0].shape[0], tuple([(feature.shape[2], feature.shape[3]) for feature in features]))

    @classmethod
    def unpack(cls, sizes: Sequence[int]) -> PyramidShape:
        num_images, *sides = sizes
        return cls(num_images, tuple(zip(sides[::2], sides[1::2], strict=True)))

    def pack(self) -> list[int]:
        """`[N, H_1, W_1, ..., H_L, W_L]`."""
        return [self.num_images, *(side for level in self.levels for side in level)]

    def empty_features(self, grad: Tensor, channels_last: bool) -> list[Tensor]:
        """Memory for the gradients of the levels, of the output's gradient `grad`."""
        return [empty(grad, (self.num_images, grad.shape[1], *level), channels_last) for level in self.levels]


def with_shape(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Pass the `sizes` of a backward operator on as a `PyramidShape`."""

    def call(
        grad: Tensor, boxes: Tensor, argmax: Tensor, sizes: list[int], channels_last: bool, spec: PyramidSpec
    ) -> list[Tensor]:
        return function(grad, boxes, argmax, PyramidShape.unpack(sizes), channels_last, spec)

    return call


def fake_backward(
    grad: Tensor, boxes: Tensor, argmax: Tensor, shape: PyramidShape, channels_last: bool, spec: PyramidSpec
) -> list[Tensor]:
    """The gradients of the levels, for `with_shape`."""
    del boxes, argmax, spec
    return shape.empty_features(grad, channels_last)


def _fake_roi_align(features: Sequence[Tensor], boxes: Tensor, spec: RoIAlignSpec) -> tuple[Tensor, Tensor]:
    return spec.empty_outputs(features, boxes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, boxes, ctx.spec = inputs
    _, argmax = output
    # The gradient of the boxes alone reads the features: they are not kept alive for that of the features.
    ctx.save_for_backward(boxes, argmax, *(features if boxes.requires_grad else ()))
    ctx.set_materialize_grads(False)  # argmax has none; zeros of its size would be written in each backward
    ctx.sizes = PyramidShape.of(features).pack()
    ctx.channels_last = is_channels_last(features[0])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[list[Tensor] | list[None], Tensor | None]:
    features_need_grad, boxes_need_grad = ctx.needs_input_grad[:2]
    grad_features, grad_boxes = [None] * len(features_need_grad), None
    if grad is None:
        return grad_features, grad_boxes
    boxes, argmax, *features = ctx.saved_tensors
    if any(features_need_grad):
        grad_features = _roi_align_backward(grad, boxes, argmax, ctx.sizes, ctx.channels_last, *ctx.spec)
    if boxes_need_grad:
        grad_boxes = _roi_align_box_backward(grad, features, boxes, argmax, *ctx.spec)
    return grad_features, grad_boxes


def _setup_double_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    del output
    grad, boxes, argmax, _, _, ctx.spec = inputs
    ctx.save_for_backward(boxes, argmax, *([grad] if boxes.requires_grad else []))


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The mean is linear in the features: its gradient's gradients are RoIAlign itself, and RoIAlign's of the boxes."""
    if ctx.spec.reduction == "max":
        raise NotImplementedError('reduction: expected "mean" for a second derivative, got "max"')
    boxes, argmax, *grad = ctx.saved_tensors
    grad_needs_grad, boxes_need_grad = ctx.needs_input_grad[:2]
    output = roi_align_operator(grads, boxes, *ctx.spec)[0] if grad_needs_grad else None
    grad_boxes = _roi_align_box_backward(*grad, grads, boxes, argmax, *ctx.spec) if boxes_need_grad else None
    return output, grad_boxes, None, None, None


def _fake_box_backward(
    grad: Tensor, features: Sequence[Tensor], boxes: Tensor, argmax: Tensor, spec: RoIAlignSpec
) -> Tensor:
    del grad, features, argmax, spec
    return boxes.new_empty(boxes.shape)


def _box_double_backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    del ctx, grad
    raise NotImplementedError("boxes: expected none that require grad for a second derivative, got boxes that do")


_roi_align_backward = register(
    "roi_align_backward(Tensor grad, Tensor boxes, Tensor argmax, SymInt[] sizes, bool channels_last, *spec)"
    " -> Tensor[]",
    reference=with_shape(roi_align_backward_reference),
    launch=with_shape(launch_roi_align_backward),
    fake=with_shape(fake_backward),
    backward=_double_backward,
    setup_context=_setup_double_backward,
    spec=RoIAlignSpec,
)

_roi_align_box_backward = register(
    "roi_align_box_backward(Tensor grad, Tensor[] features, Tensor boxes, Tensor argmax, *spec) -> Tensor",
    reference=roi_align_box_backward_reference,
    launch=launch_roi_align_box_backward,
    fake=_fake_box_backward,
    backward=_box_double_backward,
    spec=RoIAlignSpec,
)

roi_align_operator = register(
    "roi_align(Tensor[] features, Tensor boxes, *spec) -> (Tensor, Tensor)",
    reference=roi_align_reference,
    launch=launch_roi_align,
    fake=_fake_roi_align,
    backward=_backward,
    setup_context=_setup_context,
    spec=RoIAlignSpec,
)
