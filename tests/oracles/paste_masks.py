"""Random masks and boxes, their pasted probabilities in float64 by both conventions, and the kernel's variants."""

import math
from functools import partial

import torch
from torch.nn.functional import grid_sample

from fastmask.kernels._mask_sampling import CONVENTIONS
from fastmask.kernels._runtime import compute_dtype
from fastmask.kernels.paste_masks import paste_masks
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


def assert_masks(actual, exact, threshold=0.5, margin=1e-5):
    """Boolean masks, wherever the exact probability is not within `margin` of the threshold."""
    clear = (exact - threshold).abs() > margin
    assert actual.dtype == torch.bool
    assert torch.equal(actual.cpu()[clear], (exact >= threshold)[clear])
    assert not exact.numel() or clear.double().mean() > 0.99


def check_pasted(device, convention, dtype=torch.float32, image=(13, 45), boxes=None, threshold=0.5, m=14):
    """Masks and probabilities of a small image are the oracle's; by default of boxes of every size."""
    masks, drawn = draw_masks(3 if boxes is None else len(boxes), m, *image)
    masks, boxes = masks.to(dtype), drawn if boxes is None else torch.as_tensor(boxes)
    exact = ORACLES[convention](masks, boxes, *image)
    arguments = masks.to(device), boxes.to(device), image
    assert_masks(paste_masks(*arguments, threshold, convention=convention), exact, threshold)
    assert_probabilities(paste_masks(*arguments, None, convention=convention), exact, m)


def check_unreached(device):
    """Boxes that reach no pixel."""
    nan, inf = float("nan"), float("inf")
    boxes = [[nan, 0, 9, 9], [0, 0, inf, 9], [9, 9, 3, 3], [-3e38, -3e38, 3e38, 3e38], [99, 3, 120, 9], [3, 99, 9, 120]]
    boxes = torch.tensor([*boxes, [4, 2, 4, 9]], device=device)
    masks = torch.ones(len(boxes), 6, 6, device=device)
    for threshold, value in ((0.5, False), (0.0, True), (None, 0)):
        assert (paste_masks(masks, boxes, (10, 13), threshold) == value).all()


def check_threshold_zero(device):
    """Every pixel belongs to the mask, inside the boxes and outside."""
    masks, boxes = draw_masks(3, 5, 11, 37)
    assert paste_masks(masks.to(device), boxes.to(device), (11, 37), 0.0).all()


def check_full_width(device):
    """Vectors that reach from the right side of a box to its left side in the next rows, and masks of few bytes."""
    boxes = [[-2.0, -1, 50, 40], [0.2, 0.3, 8.7, 2.9], [0, 0, 1, 1]]
    for image in ((5, 37), (9, 7), (1, 5), (2, 2)):
        check_pasted(device, "aligned", torch.float32, image, boxes, m=5)
    box, unknown = torch.tensor([[-2.0, -1, 50, 2]], device=device), torch.full((1, 5, 5), math.nan, device=device)
    pasted = paste_masks(unknown, box, (5, 37), None)
    assert pasted[0, :3].isnan().all()
    assert (pasted[0, 3:] == 0).all()  # no mask pixel is read for the row below the box


# By name: asserts that a small call of one variant of the kernel agrees with an oracle.
VARIANTS = {
    **{
        f"{convention}, {str(dtype).removeprefix('torch.')}": partial(check_pasted, convention=convention, dtype=dtype)
        for convention in CONVENTIONS
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    },
    "threshold 0": check_threshold_zero,
    "boxes in float64": lambda device: check_pasted(
        device, "torchvision", image=(9, 40), boxes=torch.tensor([[3.2, 1.1, 30.9, 7.3]], dtype=torch.float64)
    ),
    "box over several passes": partial(
        check_pasted, convention="aligned", image=(40, 150), boxes=[[-5.0, -3, 170, 38], [20, 3, 28, 30]]
    ),
    "full width": check_full_width,
    "unreached": check_unreached,
}
