"""Random heatmaps and boxes, keypoints in float64 by `F.interpolate`, and the variants of the kernel."""

from functools import partial

import torch
import torch.nn.functional as F

from fastmask.kernels.decode_keypoints import decode_keypoints
from fastmask.kernels.decode_keypoints.geometry import MAX_SIDE

# The error of a value, relative to the largest magnitude of its heatmap: of positions, of up to m, and of 16 products.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def draw_heatmaps(n=2, points=3, m=8, seed=0, kind="noise"):
    """`[N, P, m, m]` of noise, or smooth ones with a peak each."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, points, m, m, generator=g)
    if kind == "noise":
        return noise * 3
    centre = torch.rand(2, n, points, 1, 1, generator=g) * m
    y, x = torch.arange(m)[:, None] + 0.5, torch.arange(m) + 0.5
    return 12 * torch.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (m / 4)) - 8 + 0.3 * noise


def draw_boxes(n=2, low=0.5, high=40.0, seed=0):
    """`[N, 4]` with log-uniform sides."""
    g = torch.Generator().manual_seed(seed + 1)
    side = low * (high / low) ** torch.rand(n, 2, generator=g)
    corner = torch.rand(n, 2, generator=g) * 50 - 5
    return torch.cat([corner, corner + side], 1)


def resized(heatmap, box):
    """One heatmap `[m, m]` in float64, resized to its box, and the pixels of the box per resized pixel, (x, y)."""
    side = (box[2:] - box[:2]).clamp(min=1)
    size = side.ceil().clamp(max=MAX_SIDE)
    width, height = size.long().tolist()
    values = F.interpolate(heatmap.double()[None, None], size=(height, width), mode="bicubic", align_corners=False)
    return values[0, 0], side.double() / size.double()


def assert_keypoints(device, heatmaps, boxes, convention="torchvision"):
    """Each keypoint is the centre of a resized pixel whose value is the largest, up to rounding; so is its score."""
    keypoints, scores = (
        t.cpu() for t in decode_keypoints(heatmaps.to(device), boxes.to(device), convention=convention)
    )
    dtype = torch.float64 if heatmaps.dtype == torch.float64 else torch.float32
    assert keypoints.shape == (*heatmaps.shape[:2], 3)
    assert scores.shape == heatmaps.shape[:2]
    assert keypoints.dtype == scores.dtype == dtype
    logits = scores if convention == "torchvision" else keypoints[..., 2]
    for n, p in torch.cartesian_prod(torch.arange(len(heatmaps)), torch.arange(heatmaps.shape[1])).tolist():
        values, per_pixel = resized(heatmaps[n, p], boxes[n].to(dtype))
        place = (keypoints[n, p, :2].double() - boxes[n, :2].double()) / per_pixel - 0.5
        x, y = pixel = place.round().long().tolist()
        assert (place - torch.tensor(pixel)).abs().max() < 1e-2 * (1 if dtype == torch.float32 else 1e-4)
        tolerance = TOLERANCE[dtype] * heatmaps[n, p].double().abs().max()
        assert values[y, x] >= values.max() - tolerance, (n, p)
        assert (logits[n, p] - values[y, x]).abs() <= tolerance
    if convention == "torchvision":
        assert (keypoints[..., 2] == 1).all()
    else:
        exact = (heatmaps.double().flatten(2) - logits.double()[..., None]).exp().sum(2).reciprocal()
        torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=0)


def check_keypoints(
    device, dtype=torch.float32, convention="torchvision", n=2, points=2, m=8, kind="noise", low=3.0, high=40.0
):
    """A small call."""
    heatmaps = draw_heatmaps(n, points, m, kind=kind).to(dtype)
    assert_keypoints(device, heatmaps, draw_boxes(n, low, high), convention)


def check_peaks_at_the_border(device):
    """Peaks in the last column and the first, whose bounds need the rows before them in the kernel's loop."""
    for m in (4, 9):
        heatmaps = draw_heatmaps(1, 1, m, kind="peak")
        assert_keypoints(device, heatmaps, torch.tensor([[3.0, 2, 50, 60]]))


def check_ties(device):
    """Equal values: the first pixel. Resizing to the heatmap's size keeps the values as they are."""
    heatmaps = torch.zeros(1, 4, 6, 6)
    heatmaps[0, 1, 2, 4] = heatmaps[0, 1, 2, 1] = heatmaps[0, 1, 4, 0] = 2
    heatmaps[0, 2, 5, 5] = heatmaps[0, 2, 4, 0] = 1
    heatmaps[0, 3] -= 1
    boxes = torch.tensor([[10.0, 20, 16, 26]])
    keypoints, scores = (t.cpu() for t in decode_keypoints(heatmaps.to(device), boxes.to(device)))
    expected = [[10.5, 20.5], [11.5, 22.5], [10.5, 24.5], [10.5, 20.5]]
    assert keypoints[0, :, :2].tolist() == expected
    assert scores.tolist() == [[0, 2, 1, -1]]


def check_non_finite_heatmaps(device):
    """The centre of the first pixel, and a NaN score."""
    for value in (torch.nan, torch.inf, -torch.inf):
        heatmaps = draw_heatmaps(1, 2, 6)
        heatmaps[0, 1, 3, 2] = value
        boxes = torch.tensor([[3.0, 4, 15, 20]])
        keypoints, scores = (t.cpu() for t in decode_keypoints(heatmaps.to(device), boxes.to(device)))
        assert keypoints[0, 1].tolist() == [3.5, 4.5, 1]
        assert scores[0, 1].isnan()
        assert scores[0, 0].isfinite()


def check_degenerate_boxes(device):
    """Empty, inverted and non-finite boxes have at least one pixel and at most `MAX_SIDE` along an axis."""
    nan, inf = torch.nan, torch.inf
    heatmaps = draw_heatmaps(1, 1, 4, kind="peak").expand(6, 1, 4, 4)
    boxes = [[5.0, 5, 5, 5], [9, 9, 3, 3], [2, 3, nan, 5], [nan, 3, 5, 5], [3, 2, 4.5, inf], [3, 2, 5, 3e9]]
    boxes = torch.tensor(boxes)
    keypoints, scores = (t.cpu() for t in decode_keypoints(heatmaps.to(device), boxes.to(device)))
    assert scores.isfinite().all()
    assert keypoints[:3, 0, 0].tolist() == [5.5, 9.5, 2.5]
    assert keypoints[3, 0, 0].isnan()
    assert not keypoints[4, 0, 1].isfinite()
    assert_keypoints(device, heatmaps[5:], boxes[5:])


# By name: asserts that a small call of one variant of the kernel agrees with the oracle.
VARIANTS = {
    **{
        f"{convention}, {str(dtype).removeprefix('torch.')}": partial(
            check_keypoints, dtype=dtype, convention=convention
        )
        for convention in ("torchvision", "detectron2")
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    },
    "peaks": partial(check_keypoints, kind="peak", high=80.0),
    "peaks at the border": check_peaks_at_the_border,
    "reduced": partial(check_keypoints, m=15, low=0.5, high=6.0),
    "several steps in a cell": partial(check_keypoints, m=3, kind="peak", n=1, low=60.0, high=90.0),
    "one pixel": partial(check_keypoints, m=1, points=1),
    "ties": check_ties,
    "heatmaps that are not finite": check_non_finite_heatmaps,
    "degenerate boxes": check_degenerate_boxes,
}
