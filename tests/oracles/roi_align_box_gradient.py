"""The gradient of RoIAlign's boxes in float64, sample by sample, and a small check of every variant of its kernel."""

import math
from functools import partial

import torch

from fastmask import multiscale_roi_align
from tests.oracles.budget import assert_within_budget
from tests.oracles.roi_align import SCALES, draw_boxes, draw_pyramid

NAN, INF = math.nan, math.inf
SIZES = [(9, 13), (5, 7)]  # of the levels of a pyramid whose scales are SCALES
CANONICAL = {"canonical_box_size": 24, "canonical_level": 3}  # boxes of 24 pixels and more are on the second level


def box_gradients(grad, features, boxes, level_of, *, scales, ratio, aligned, reduction):
    """Gradients `[K, 5]` in float64, and a bound `[K, 5]` for their error: the sum of the magnitudes of their terms.

    A coordinate is rounded at most three times, which moves a sample by a tenth of the float32 budget times the
    coordinate, and changes the weights of its neighbours by as much.
    """
    gradients, bounds = torch.zeros(2, len(boxes), 5, dtype=torch.float64)
    for k, (image, *corners) in enumerate(boxes.double().tolist()):
        feature, scale = features[level_of[k]][int(image)].double(), scales[level_of[k]]
        x1, y1, x2, y2 = (corner * scale - (0.5 if aligned else 0) for corner in corners)
        for p in range(grad.shape[2]):
            for q in range(grad.shape[3]):
                ys = _samples(y1, y2, p, grad.shape[2], feature.shape[1], ratio, aligned)
                xs = _samples(x1, x2, q, grad.shape[3], feature.shape[2], ratio, aligned)
                samples = [_sample(feature, y, x) for y in ys for x in xs]
                grad_bin = grad[k, :, p, q].double()
                of_samples = grad_bin.expand(len(samples), -1) / max(len(samples), 1)
                if reduction == "max" and samples:
                    winner = torch.stack([value for value, *_ in samples]).argmax(0)  # the first of equals
                    of_samples = torch.nn.functional.one_hot(winner, len(samples)).T * grad_bin
                for of_sample, (_, of_y, of_x, bound, y_end, x_end) in zip(of_samples, samples, strict=True):
                    of_y, of_x = (of_sample * of_y).sum(), (of_sample * of_x).sum()
                    bound = (of_sample.abs() * bound).sum()
                    shares = torch.tensor([0, 1 - x_end, 1 - y_end, x_end, y_end], dtype=torch.float64)
                    gradients[k] += torch.stack([of_x * 0, of_x, of_y, of_x, of_y]) * shares * scale
                    bounds[k] += bound * shares * scale
    return gradients, bounds


def _samples(start, end, p, bins, extent, ratio, aligned):
    """Of each sample of bin p: position, number of pixels of the level, and derivative with respect to the end."""
    size = end - start if aligned else max(end - start, 1)
    grid = ratio if ratio > 0 else max(math.ceil(size / bins), 0)
    shares = [(p + (i + 0.5) / grid) / bins for i in range(grid)]
    return [(start + share * size, extent, share if aligned or end - start >= 1 else 0.0) for share in shares]


def _sample(feature, y, x):
    """Value, its derivatives with respect to y and x, and their bound, each `[C]`; shares of the ends of the box."""
    (y, height, y_end), (x, width, x_end) = y, x
    rows, weight_y, slope_y, error_y = _taps(y, height)
    columns, weight_x, slope_x, error_x = _taps(x, width)
    pixels = feature[:, rows][:, :, columns]
    value = torch.einsum("cyx,y,x->c", pixels, weight_y, weight_x)
    of_y = torch.einsum("cyx,y,x->c", pixels, slope_y, weight_x)
    of_x = torch.einsum("cyx,y,x->c", pixels, weight_y, slope_x)
    bound = torch.einsum("cyx,y,x->c", pixels.abs(), weight_y + error_y, weight_x + error_x)
    return value, of_y, of_x, bound, y_end, x_end


def _taps(position, extent):
    """Two neighbours along an axis, their weights, the derivatives of these, and the errors of these."""
    clamped = min(max(position, 0.0), extent - 1.0)
    low = int(clamped)
    inside, moves = -1 <= position <= extent, 0 < position < extent - 1
    weights = torch.tensor([1 - clamped + low, clamped - low], dtype=torch.float64) * inside
    slopes = torch.tensor([-1.0, 1.0], dtype=torch.float64) * moves
    return [low, min(low + 1, extent - 1)], weights, slopes, 0.1 * (clamped + 1)


def levels_of(boxes):
    """The level of each box in a pyramid of two, under `CANONICAL`."""
    return [int(area >= 24**2) for area in (boxes[:, 3:] - boxes[:, 1:3]).double().prod(1)]


def check_gradients(
    device, *, dtype, ratio, aligned, reduction="mean", last=True, channels=5, pooled=(3, 2), boxes=None
):
    """Pool from a pyramid of two levels, and compare the gradient of its boxes with `box_gradients`."""
    layout = torch.channels_last if last else torch.contiguous_format
    features = draw_pyramid(SIZES, dtype, channels=channels, layout=layout)
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    boxes = draw_boxes(3, 2, 48, seed=ratio + 7) if boxes is None else torch.tensor(boxes)
    boxes = boxes.to(coordinates)
    leaf = boxes.to(device).requires_grad_()
    options = {"aligned": aligned, "reduction": reduction}
    out = multiscale_roi_align([f.to(device) for f in features], leaf, pooled, SCALES, ratio, **options, **CANONICAL)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (actual,) = torch.autograd.grad(out, leaf, grad.to(device))
    assert actual.dtype == coordinates
    exact, bound = box_gradients(grad, features, boxes, levels_of(boxes), scales=SCALES, ratio=ratio, **options)
    assert exact[:, 1:].any()
    assert_within_budget(actual, exact, bound)


def check_boxes_that_are_not_pooled(device):
    """Non-finite boxes and boxes without a level have gradient 0, also where the incoming gradient is NaN."""
    features = [level.to(device) for level in draw_pyramid(SIZES, channels=3)]
    boxes = [[0, NAN, 0, 5, 5], [0, 0, 0, INF, 5], [1, -INF, 0, 5, 5], [0, -3e38, 0, 3e38, 9], [0, 30, 4, 10, 20]]
    leaf = torch.tensor(boxes, device=device).requires_grad_()
    out = multiscale_roi_align(features, leaf, 2, SCALES, 0, True, **CANONICAL)
    (actual,) = torch.autograd.grad(out, leaf, torch.full_like(out, NAN))
    assert actual.eq(0).all()


ACROSS = [  # the borders, empty, inverted
    [0, -20, -9, 30, 20],
    [1, 30, 20, 90, 50],
    [0, 200, 100, 230, 130],
    [0, 10, 10, 10, 10],
    [1, 30, 30, 9, 8],
]
HUGE = [[1, -1e9, -1e9, 1e9, 1e9], *ACROSS]  # a billion pixels wide
BEFORE = [[0, 10, -76, 60, 51.2], [1, -47, 5, 81, 45]]  # an adaptive grid skips samples before the level
_HALF, _BRAIN = torch.float16, torch.bfloat16

VARIANTS = {
    f"gradient of boxes, {name}": partial(check_gradients, **options)
    for name, options in {
        "float32, ratio 2": {"dtype": torch.float32, "ratio": 2, "aligned": False},
        "float32, ratio 3, NCHW": {"dtype": torch.float32, "ratio": 3, "aligned": True, "last": False},
        "float16, ratio 2": {"dtype": _HALF, "ratio": 2, "aligned": True, "channels": 8},
        "bfloat16, adaptive": {"dtype": _BRAIN, "ratio": 0, "aligned": True, "channels": 8},
        "float64, adaptive": {"dtype": torch.float64, "ratio": 0, "aligned": False},
        "max, float32, ratio 2": {"dtype": torch.float32, "ratio": 2, "aligned": False, "reduction": "max"},
        "max, bfloat16, adaptive": {"dtype": _BRAIN, "ratio": 0, "aligned": True, "reduction": "max", "last": False},
        "300 channels": {"dtype": torch.float32, "ratio": 1, "aligned": True, "channels": 300, "pooled": (1, 1)},
        "degenerate boxes": {"dtype": torch.float32, "ratio": 2, "aligned": False, "boxes": HUGE},
        "degenerate boxes, adaptive": {"dtype": torch.float64, "ratio": 0, "aligned": True, "boxes": ACROSS},
        "skipped samples": {"dtype": torch.float32, "ratio": 0, "aligned": False, "boxes": BEFORE},
        "max, skipped samples": {
            "dtype": torch.float64,
            "ratio": 0,
            "aligned": True,
            "reduction": "max",
            "boxes": BEFORE,
        },
    }.items()
} | {"gradient of boxes that are not pooled": check_boxes_that_are_not_pooled}
