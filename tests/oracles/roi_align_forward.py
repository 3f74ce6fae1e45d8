"""A small call of every variant of RoIAlign's forward kernel, compared with the matrices of the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torchvision

from fastmask import multiscale_roi_align, roi_align
from fastmask.kernels.roi_align import forward
from fastmask.kernels.roi_align.op import RoIAlignSpec, roi_align_operator
from tests.oracles.budget import assert_within_budget
from tests.oracles.roi_align import as_rows, draw_pyramid, roi_align_matrices

SIZES = [(12, 15), (9, 7), (5, 6), (3, 4), (2, 1)]
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64]
CANONICAL_SIZE = 24  # boxes of this side are pooled from the second level
# Inside, across the border, beyond it, inverted, and of every level.
BOXES = [
    [0, 3.7, 9.2, 21.3, 30.1],
    [1, -9.5, 4.2, 17.1, 55.3],
    [1, 70.0, -20.0, 90.3, -9.0],
    [0, 20.2, 18.4, 9.1, 5.7],
    [0, 1.5, 2.5, 72.1, 55.0],
    [1, -30.2, 3.1, 99.9, 120.3],
    [1, 10.0, -40.0, 330.0, 210.0],
]


def check(
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
    ratio: int = 2,
    aligned: bool = False,
    reduction: str = "mean",
    channels: int = 8,
    pooled: tuple[int, int] = (3, 2),
    levels: int = 2,
) -> None:
    """The pooled features agree within the error budget."""
    sizes, scales = SIZES[:levels], SCALES[:levels]
    features = draw_pyramid(sizes, dtype, channels=channels, layout=layout)
    boxes = torch.tensor(BOXES, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    area = (boxes[:, 3:] - boxes[:, 1:3]).double().prod(1)
    boxes = boxes[area > 0] if levels > 1 else boxes  # both peers leave out boxes of negative area
    area = area[area > 0]
    level_of = [0] * len(boxes)
    if levels > 1:
        level_of = [min(max(math.floor(math.log2(math.sqrt(a) / CANONICAL_SIZE)) + 1, 0), levels - 1) for a in area]
        assert set(level_of) == set(range(levels))
    moved = [feature.to(device) for feature in features]
    options = {"sampling_ratio": ratio, "aligned": aligned, "reduction": reduction}
    if levels == 1:
        actual = roi_align(moved[0], boxes.to(device), pooled, scales[0], **options)
    else:
        options |= {"canonical_box_size": CANONICAL_SIZE, "canonical_level": 3}
        actual = multiscale_roi_align(moved, boxes.to(device), pooled, scales, **options)
    assert actual.is_contiguous(memory_format=layout)

    # The maximum is that of the means of single samples.
    split = (ratio if ratio > 0 else 1) if reduction == "max" else 1
    matrices, bounds = roi_align_matrices(
        boxes,
        level_of,
        sizes=sizes,
        images=2,
        pooled=(pooled[0] * split, pooled[1] * split),
        scales=scales,
        ratio=1 if reduction == "max" and ratio > 0 else ratio,
        aligned=aligned,
    )
    rows = torch.cat([as_rows(feature) for feature in features])
    exact, bound = torch.cat(matrices, 1) @ rows, torch.cat(bounds, 1) @ rows.abs()
    grid = (len(boxes), pooled[0], split, pooled[1], split, channels)
    samples, bounds = (rows.view(grid).transpose(2, 3).flatten(3, 4) for rows in (exact, bound))
    exact, bound = (rows.amax(3).flatten(0, 2) for rows in (samples, bounds))
    assert_within_budget(as_rows(actual), exact, bound, dtype)
    if reduction == "max":
        spec = RoIAlignSpec(*pooled, scales, ratio, aligned, reduction, CANONICAL_SIZE, 3)
        _, argmax = roi_align_operator(moved, boxes.to(device), *spec)
        winner = argmax.permute(0, 2, 3, 1)[:, :, :, None].long().cpu()
        assert_within_budget(samples.gather(3, winner).flatten(0, 3), exact, bound, dtype)


def check_adaptive_maximum(device: str, dtype: torch.dtype) -> None:
    """Bins of 2.5 x 1.5 pixels take 3 x 2 samples, which are bins of their own where a bin has one sample."""
    (feature,) = draw_pyramid([(12, 15)], dtype, channels=8, layout=torch.channels_last)
    boxes = torch.tensor([[0, 8, 4, 8 + 12, 4 + 20], [1, -10, -4, -10 + 12, -4 + 20], [0, 80, 90, 92, 110.0]])
    actual = roi_align(feature.to(device), boxes.to(device), 2, 1 / 4, 0, True, reduction="max")
    samples = torchvision.ops.roi_align(feature.double(), boxes.double(), (6, 4), 1 / 4, 1, True)
    exact = samples.view(3, 8, 2, 3, 2, 2).amax((3, 5))
    assert_within_budget(actual.cpu(), exact, exact.abs() + 1, dtype)


def check_degenerate_boxes(device: str, ratio: int) -> None:
    """Non-finite boxes have no features, huge ones end, and none reads outside the feature map."""
    (feature,) = draw_pyramid([(6, 7)], torch.bfloat16, channels=8, layout=torch.channels_last)
    nan, inf = math.nan, math.inf
    pooled = [[0, 2, 1, 5, 4], [0, -1e9, -2, 1e9, 7], [0, -3e18, -3e18, 3e18, 3e18], [1, 3e38, 3e38, 3.1e38, 3.2e38]]
    others = [[0, nan, 1, 2, 3], [0, 1, 1, inf, 2], [0, -3e38, 0, 3e38, 5], [2, 0, 0, 5, 5], [-1, 0, 0, 5, 5]]
    out = roi_align(feature.to(device), torch.tensor([*pooled, *others[:3]]).to(device), 2, 1.0, ratio)
    assert out.isfinite().all()
    assert out[0].ne(0).all()
    assert out[len(pooled) :].eq(0).all()


def _with(setting: str, value: int, check: Callable[[str], None]) -> Callable[[str], None]:
    """`check` with a constant of the launcher replaced, which takes a path that only large inputs take."""

    def checked(device: str) -> None:
        with mock.patch.object(forward, setting, value):
            check(device)

    return checked


BFLOAT16, LONG = torch.bfloat16, (5, 4)  # 20 bins are three tiles

VARIANTS: dict[str, Callable[[str], None]] = {
    "forward, float32": check,
    "forward, float64": partial(check, dtype=torch.float64),
    "forward, float16": partial(check, dtype=torch.float16, aligned=True),
    "forward, bfloat16, 5 levels": partial(check, dtype=BFLOAT16, levels=5),
    "forward, bfloat16, NCHW": partial(check, dtype=BFLOAT16, layout=torch.contiguous_format, pooled=LONG),
    "forward, bfloat16, ratio 3, 1 level": partial(check, dtype=BFLOAT16, ratio=3, levels=1, aligned=True),
    "forward, float32, ratio 4": partial(check, ratio=4, pooled=(1, 2)),
    "forward, bfloat16, adaptive": partial(check, dtype=BFLOAT16, ratio=0, aligned=True),
    "forward, float32, adaptive": partial(check, ratio=0),
    "forward, float64, adaptive, NCHW": partial(check, dtype=torch.float64, ratio=0, layout=torch.contiguous_format),
    "forward, bfloat16, maximum": partial(check, dtype=BFLOAT16, reduction="max"),
    "forward, float32, maximum, NCHW": partial(check, reduction="max", layout=torch.contiguous_format),
    "forward, bfloat16, adaptive maximum": partial(check_adaptive_maximum, dtype=BFLOAT16),
    "forward, float32, 70 channels": partial(check, channels=70, pooled=(1, 2)),
    "forward, float32, 136 channels": partial(check, channels=136, pooled=(1, 2)),  # two blocks of channels
    "forward, bfloat16, 256 channels": partial(check, dtype=BFLOAT16, channels=256, pooled=(2, 2)),
    "forward, bfloat16, several tiles a program": _with(
        "PROGRAMS", 1, partial(check, dtype=BFLOAT16, channels=16, pooled=LONG)
    ),
    "forward, float32, adaptive, several tiles a program": _with(
        "PROGRAMS_ADAPTIVE", 12, partial(check, ratio=0, pooled=LONG)
    ),
    "forward, bfloat16, 64-bit offsets": _with("MAX_NARROW_OFFSET", 0, partial(check, dtype=BFLOAT16)),
    "forward, degenerate boxes": partial(check_degenerate_boxes, ratio=2),
    "forward, degenerate boxes, adaptive": partial(check_degenerate_boxes, ratio=0),
}
