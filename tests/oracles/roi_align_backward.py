"""A small call of every variant of the kernels of RoIAlign's gradient, against float64."""

from functools import partial
from unittest import mock

import torch

from benchmarks.harness.pooling import torchvision_ops
from fastmask import multiscale_roi_align
from fastmask.kernels.roi_align import backward, level_lists
from fastmask.kernels.roi_align.op import RoIAlignSpec
from tests.oracles.budget import assert_within_budget
from tests.oracles.roi_align import SCALES, as_rows, draw_boxes, draw_pyramid, roi_align_matrices

LAST, NCHW = torch.channels_last, torch.contiguous_format
SIZES = [(9, 13), (5, 7)]


def one_spot(count):
    """Boxes that all reach the same four tiles of the first level, and one of the second level."""
    boxes = torch.tensor([[0.0, 9.0, 11.0, 31.5, 27.25]]).repeat(count, 1)
    boxes[:, 1:] += torch.arange(count)[:, None] / 64
    boxes[-1] = torch.tensor([0.0, 1, 2, 45, 35])
    return boxes


def check_mean(
    device, dtype=torch.float32, layout=LAST, *, channels=16, pooled=(7, 7), ratio=2, aligned=False, sizes=SIZES,
    boxes=None, images=None,
):  # fmt: skip
    """The gradient of the mean, without its forward."""
    images = images or min(len(sizes), 2)
    boxes = (
        draw_boxes(3 if pooled[0] * pooled[1] > 64 else 5, images, 48, seed=pooled[1] + 7 * ratio)
        if boxes is None
        else boxes
    )
    boxes = boxes.double() if dtype == torch.float64 else boxes
    scales = SCALES[: len(sizes)]
    level_of = [int(area >= 24**2 and len(sizes) > 1) for area in (boxes[:, 3:] - boxes[:, 1:3]).double().prod(1)]
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(len(boxes), channels, *pooled, generator=g).to(dtype, memory_format=layout)
    spec = RoIAlignSpec(pooled[0], pooled[1], scales, ratio, aligned, "mean", canonical_box_size=24, canonical_level=3)
    no_argmax = torch.empty(0, 0, 0, 0, dtype=torch.int32, device=device)
    shape = [images, *(side for size in sizes for side in size)]
    grads = torch.ops.fastmask.roi_align_backward(
        grad.to(device), boxes.to(device), no_argmax, shape, layout == LAST, *spec
    )
    options = {"pooled": pooled, "scales": scales, "ratio": ratio, "aligned": aligned}
    matrices, bounds = roi_align_matrices(boxes, level_of, sizes=sizes, images=images, **options)
    for actual, matrix, bound in zip(grads, matrices, bounds, strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=layout)
        assert_within_budget(as_rows(actual), matrix.T @ as_rows(grad), bound.T @ as_rows(grad).abs(), dtype)


def check_max(device, dtype=torch.float32, layout=LAST, *, ratio=2, count=4):
    """The gradient of the maximum, from the forward's choice of samples."""
    (feature,) = draw_pyramid([(9, 8)], torch.float64, images=1, channels=5, layout=layout)
    boxes = draw_boxes(count, 1, 30, seed=4, dtype=torch.float64)
    boxes[:, 3:] = boxes[:, 1:3] + torch.tensor([20.5, 21.5])  # ceil of every bin is 3
    grid = ratio if ratio > 0 else 3
    feature = feature.to(dtype).double()
    boxes = boxes.to(dtype).double()
    exact = feature.clone().requires_grad_()
    split = torchvision_ops.roi_align(exact, boxes, 2 * grid, 0.25, 1)  # bins of one sample, whose mean is the sample
    grad = torch.randn(count, 5, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to(dtype).double()
    expected = torch.autograd.grad(split.unfold(2, grid, grid).unfold(3, grid, grid).amax((-1, -2)), exact, grad)[0]
    leaf = feature.to(device, dtype).requires_grad_()
    out = multiscale_roi_align([leaf], boxes.to(device, dtype), 2, [0.25], ratio, reduction="max")
    (actual,) = torch.autograd.grad(out, leaf, grad.to(device, dtype))
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def with_constants(check, device, **constants):
    """Run `check` with other values of the launcher's constants, which small inputs would not reach."""
    backward._prepared.cache_clear()
    with mock.patch.multiple(backward, **constants):
        check(device)
    backward._prepared.cache_clear()


def check_long_level_lists(device):
    """More boxes than a step of either kernel that lists them."""
    boxes = draw_boxes(70, 1, 30, seed=3)
    boxes[:, 3:] = boxes[:, 1:3] + 3
    with (
        mock.patch.object(level_lists, "BOXES_PER_STEP", 32),
        mock.patch.multiple(backward, BOXES_PER_STEP=32, MAX_SEGMENTS=2),
    ):
        check_mean(device, boxes=boxes, pooled=(1, 1), sizes=[(8, 9)])


VARIANTS = {
    "backward, float32": partial(check_mean, sizes=[(9, 8)]),
    "backward, float32, NCHW": partial(check_mean, layout=NCHW),
    "backward, float32, several channel blocks": partial(check_mean, channels=90, pooled=(2, 3)),
    "backward, float16": partial(check_mean, dtype=torch.float16, aligned=True),
    "backward, bfloat16": partial(check_mean, dtype=torch.bfloat16),
    "backward, bfloat16, NCHW, adaptive": partial(
        check_mean, dtype=torch.bfloat16, layout=NCHW, ratio=0, aligned=True, pooled=(3, 3)
    ),
    "backward, bfloat16, 256 channels": partial(
        check_mean, dtype=torch.bfloat16, channels=256, sizes=[(9, 7)], aligned=True
    ),
    "backward, bfloat16, 300 channels": partial(
        check_mean, dtype=torch.bfloat16, channels=300, sizes=[(7, 7)], pooled=(2, 2)
    ),
    "backward, adaptive": partial(check_mean, ratio=0, pooled=(3, 5)),
    "backward, one sample": partial(check_mean, ratio=1, pooled=(3, 20)),
    "backward, three samples": partial(check_mean, ratio=3, pooled=(5, 2), aligned=True),
    "backward, four samples": partial(check_mean, ratio=4, pooled=(1, 1)),
    "backward, masks": partial(check_mean, pooled=(14, 14), sizes=[(9, 8)], dtype=torch.bfloat16),
    "backward, 70 columns": partial(check_mean, pooled=(1, 70), ratio=1, sizes=[(8, 9)]),
    "backward, maximum": check_max,
    "backward, maximum, adaptive, float64, NCHW": partial(check_max, dtype=torch.float64, layout=NCHW, ratio=0),
    "backward, long lists of a level": check_long_level_lists,
    "backward, more levels of images than a step": partial(
        check_mean, pooled=(1, 1), channels=4, sizes=[(3, 4), (2, 2)], images=33
    ),
    "backward, several launches": partial(
        with_constants, partial(check_mean, pooled=(2, 2)), MAX_LIST_ENTRIES=3 * 5
    ),
    "backward, crowd in several launches": partial(
        with_constants,
        partial(check_mean, pooled=(1, 1), sizes=[(9, 10), (5, 5)], boxes=one_spot(12)),
        SEGMENT=4,
        MAX_LIST_ENTRIES=3 * 12,
    ),
    "backward, crowd": partial(
        with_constants,
        partial(check_mean, pooled=(2, 2), sizes=[(9, 10), (5, 5)], boxes=one_spot(12)),
        SEGMENT=4,
        MAX_SEGMENTS=32,
        TILES_PER_STEP=4,
    ),
    "backward, bfloat16, crowd, too few slots": partial(
        with_constants,
        partial(check_mean, dtype=torch.bfloat16, pooled=(5, 2), sizes=[(9, 10), (5, 5)], boxes=one_spot(12)),
        SEGMENT=4,
        MAX_SEGMENTS=7,
    ),
    "backward, maximum, crowd": partial(
        with_constants, partial(check_max, dtype=torch.float64, count=5), SEGMENT=2, MAX_SEGMENTS=6
    ),
}  # fmt: skip
