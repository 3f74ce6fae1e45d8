"""Inputs of RoIPool for tests, comparisons with torchvision and integer arithmetic, and RoIWarp's rounded boxes."""

import math

import torch
from torchvision.ops import roi_pool as torchvision_roi_pool

from fastmask import roi_pool


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
