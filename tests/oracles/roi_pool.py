"""Inputs of RoIPool for tests, comparisons with torchvision and integer arithmetic, and RoIWarp's rounded boxes."""

import math
from typing import Any

import torch
import torchvision
from torchvision.ops.poolers import LevelMapper

from fastmask import multiscale_roi_pool, roi_pool
from fastmask.kernels._runtime import INTERPRETED

torchvision_roi_pool: Any = torchvision.ops.roi_pool  # torch.fx.wrap hides its type


def draw_features_and_boxes(images, channels, height, width, *, boxes, seed, dtype=torch.float32):
    """Features and boxes; some boxes are empty, inverted, or partly or completely outside the feature map."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(images, channels, height, width, generator=g, dtype=torch.float64)
    image = torch.randint(images, (boxes, 1), generator=g)
    side = torch.tensor([width, height])
    corner = (torch.rand(boxes, 2, generator=g) * 1.6 - 0.4) * side
    size = (torch.rand(boxes, 2, generator=g) * 1.2 - 0.1) * side
    return features.to(dtype), torch.cat([image, corner, corner + size], 1).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def draw_pyramid_and_boxes(sizes, *, images=2, channels=5, boxes, seed, dtype=torch.float32):
    """Levels of scales 1/2, 1/4, ... and boxes in image pixels, from small ones to the size of the image.

    One box is inverted along x, and some lie partly outside.
    """
    g = torch.Generator().manual_seed(seed)
    features = [torch.randn(images, channels, *size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]
    image = torch.randint(images, (boxes, 1), generator=g)
    side = 2 * torch.tensor([sizes[0][1], sizes[0][0]])
    size = side * torch.logspace(-1.2, 0, boxes)[:, None] * (0.7 + 0.6 * torch.rand(boxes, 2, generator=g))
    corner = torch.rand(boxes, 2, generator=g) * (side - 0.7 * size) - 0.15 * size
    size[: boxes // 4, 0] *= -1
    rois = torch.cat([image, corner, corner + size], 1)
    return features, rois.double() if dtype == torch.float64 else rois


def forward_backward(pool, features, boxes, grad, *arguments):
    """The output, and the gradient of the features, given the gradient `grad` of the output."""
    features = features.detach().requires_grad_()
    output = pool(features, boxes, *arguments)
    output.backward(grad.to(output))
    return output.detach(), features.grad


def assert_like_torchvision(device, features, boxes, size, scale=1.0):
    """The output and the gradient are torchvision's, bit for bit."""
    grad = torch.randn(len(boxes), features.shape[1], *size, dtype=features.dtype)
    expected = forward_backward(torchvision_roi_pool, features, boxes, grad, size, scale)
    actual = forward_backward(roi_pool, features.to(device), boxes.to(device), grad, size, scale)
    assert torch.equal(actual[0].cpu(), expected[0])
    assert torch.equal(actual[1].cpu(), expected[1])


def pool_by_level(pool, features, boxes, scales, canonical_box_size=224, canonical_level=4):
    """Pool each box from its level, one level after the other, as torchvision's MultiScaleRoIAlign does.

    Args:
        pool: (features of a level, boxes `[K_l, 5]`, scale) to `[K_l, C, PH, PW]`.
        features: the levels.
        boxes: `[K, 5]`.
        scales: powers of two, of consecutive levels.
        canonical_box_size, canonical_level: as for `multiscale_roi_pool`.
    """
    first, last = (int(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    levels = LevelMapper(first, last, canonical_box_size, canonical_level)([boxes[:, 1:]])
    rows = [torch.where(levels == level)[0] for level in range(len(features))]
    pooled = [pool(feature, boxes[k], scale) for feature, k, scale in zip(features, rows, scales, strict=True)]
    output = pooled[0].new_zeros(len(boxes), *pooled[0].shape[1:])
    for k, of_level in zip(rows, pooled, strict=True):
        output[k] = of_level
    return output


def assert_pyramid_like_torchvision(device, features, boxes, size, scales, canonical_box_size):
    """The output and the gradients of all levels are torchvision's of each level, bit for bit.

    torchvision pools float16 and bfloat16 in float32: a maximum is one of the features, and a sum is rounded once.
    """
    wide = [feature.detach().to(boxes.dtype).requires_grad_() for feature in features]
    grad = torch.randn(len(boxes), features[0].shape[1], *size).to(features[0].dtype)

    def pool(feature, rois, scale):
        return torchvision_roi_pool(feature, rois, size, scale)

    expected = pool_by_level(pool, wide, boxes, scales, canonical_box_size)
    expected_grads = torch.autograd.grad(expected, wide, grad.to(expected.dtype))
    leaves = [feature.detach().to(device).requires_grad_() for feature in features]
    output = multiscale_roi_pool(leaves, boxes.to(device), size, scales, canonical_box_size=canonical_box_size)
    grads = torch.autograd.grad(output, leaves, grad.to(device))
    assert torch.equal(output.cpu(), expected.to(output.dtype))
    for actual, gradient in zip(grads, expected_grads, strict=True):
        assert torch.equal(actual.cpu(), _as_stored(gradient, actual.dtype))


def _as_stored(sums, dtype):
    """Sums in the dtype of features, rounded as kernels do: Triton 3.6's interpreter truncates to bfloat16."""
    if INTERPRETED and dtype == torch.bfloat16:
        sums = (sums.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return sums.to(dtype)


def exact_pool(features, boxes, size):
    """Maxima and argmax by integer arithmetic, for boxes that are whole pixels already."""
    output = torch.zeros(len(boxes), features.shape[1], *size, dtype=features.dtype)
    argmax = torch.full(output.shape, -1, dtype=torch.int32)
    height, width = features.shape[2:]
    for k, (image, x1, y1, x2, y2) in enumerate(boxes.long().tolist()):
        w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
        for ph in range(size[0]):
            rows = range(y1 + ph * h // size[0], y1 - (-(ph + 1) * h // size[0]))
            for pw in range(size[1]):
                columns = range(x1 + pw * w // size[1], x1 - (-(pw + 1) * w // size[1]))
                for c in range(features.shape[1]):
                    inside = [
                        (-features[image, c, y, x].item(), y * width + x)
                        for y in rows
                        for x in columns
                        if 0 <= y < height and 0 <= x < width
                    ]
                    if inside:
                        value, argmax[k, c, ph, pw] = min(inside)
                        output[k, c, ph, pw] = -value
    return output, argmax


def warped_boxes(boxes, scale):
    """Boxes `[K, 5]` rounded to whole pixels as C rounds, last pixel included. RoIWarp is RoIAlign of these boxes."""

    def rounded(value):
        return math.copysign(math.floor(abs(value) + 0.5), value)

    corners = []
    for image, *box in boxes.tolist():
        x1, y1, x2, y2 = (rounded(value * scale) for value in box)
        corners.append([image, x1, y1, x1 + max(x2 - x1 + 1, 1), y1 + max(y2 - y1 + 1, 1)])
    return torch.tensor(corners, dtype=boxes.dtype).view(-1, 5)
