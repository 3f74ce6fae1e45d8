"""Random masks and boxes, and their pasted probabilities in float64 by both conventions."""

import math

import torch
from torch.nn.functional import grid_sample

from fastmask.kernels._runtime import compute_dtype
from tests.oracles.budget import BUDGET, assert_within_budget


def draw_masks(n, m, height, width, seed=0):
    """Masks, and boxes of every size that touch the image, the last one far larger than it."""
    g = torch.Generator().manual_seed(seed)
    image = torch.tensor([width, height])
    side = torch.exp(torch.randn(n, 2, generator=g) + math.log(0.4 * max(height, width) + 1))
    side[-1] = 40 * max(height, width)
    corner = torch.rand(n, 2, generator=g) * (image + side) - side
    return torch.rand(n, m, m, generator=g), torch.cat([corner, corner + side], 1)


def grid_sample_oracle(masks, boxes, height, width):
    """Probabilities `[N, H, W]` by float64 `grid_sample`, an independent bilinear interpolation, over the image."""
    x1, y1, x2, y2 = boxes.double()[:, :, None].unbind(1)
    gy = (torch.arange(height) + 0.5 - y1) / (y2 - y1) * 2 - 1
    gx = (torch.arange(width) + 0.5 - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack([gx[:, None].expand(-1, height, -1), gy[:, :, None].expand(-1, -1, width)], 3)
    return grid_sample(masks.double()[:, None], grid, align_corners=False)[:, 0]


def torchvision_oracle(masks, boxes, height, width):
    """torchvision's convention in plain loops: in float64, except the expansion, in the dtype of the boxes."""
    n, m, _ = masks.shape
    out = torch.zeros(n, height, width, dtype=torch.float64)
    centre, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((m + 2) / m)
    spans = torch.cat([centre - half, centre + half], 1).tolist()
    padded = torch.nn.functional.pad(masks.double(), (1, 1, 1, 1)).tolist()

    def taps(size):  # for each of `size` pixels, the two padded mask pixels and the second one's weight
        positions = [max((i + 0.5) * (m + 2) / size - 0.5, 0.0) for i in range(size)]
        return [(int(p), min(int(p) + 1, m + 1), p - int(p)) for p in positions]

    for k in range(n):
        x1, y1, x2, y2 = map(int, spans[k])
        columns, rows = taps(max(x2 - x1 + 1, 1)), taps(max(y2 - y1 + 1, 1))
        for y in range(max(y1, 0), min(y2 + 1, height)):
            r0, r1, dy = rows[y - y1]
            for x in range(max(x1, 0), min(x2 + 1, width)):
                c0, c1, dx = columns[x - x1]
                above = padded[k][r0][c0] * (1 - dx) + padded[k][r0][c1] * dx
                below = padded[k][r1][c0] * (1 - dx) + padded[k][r1][c1] * dx
                out[k, y, x] = above * (1 - dy) + below * dy
    return out


ORACLES = {"aligned": grid_sample_oracle, "torchvision": torchvision_oracle}


def assert_probabilities(actual, exact, m):
    """Within the budget of the output's dtype for its rounding, and of the compute dtype for coordinates.

    A coordinate has a magnitude of up to m + 2. Its error changes a probability by at most the error times the
    difference of neighbours, which is at most 1, along each axis.
    """
    coordinates = 2 * (m + 2) * BUDGET[compute_dtype(actual.dtype)] / BUDGET[actual.dtype]
    assert_within_budget(actual, exact, exact + coordinates)
