"""The keypoint loss of a training step: 17 heatmaps of 56 x 56 for each person (He et al. 2017, §5).

Bytes: the heatmaps of keypoints with a target read twice, and the gradient of all written. FLOPs: four for each pixel
that is read, forward and backward.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmask
from benchmarks import model_losses
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.operators import Call, Draw, Limit, Operator, meta
from benchmarks.harness.workloads import DTYPES, LAYOUTS, generator
from benchmarks.reporting.results import FASTMASK
from tests.oracles.keypoint_loss import VARIANTS, assert_keypoint_loss, draw_heatmaps

ROIS, POINTS, SIDE = 128, 17, 56
LABELLED = 0.6  # of the keypoints


def compare_with_torch(
    comparison: Comparison, name: str, *, rois: int = ROIS, dtype: str, layout: str, **options: Unpack[CaseOptions]
) -> None:
    """Compare with PyTorch's cross-entropy of the valid keypoints, as torchvision computes it, and its autograd."""
    g = generator()
    heatmaps = torch.randn(rois, POINTS, SIDE, SIDE, generator=g)
    heatmaps = heatmaps.to(comparison.device, DTYPES[dtype], memory_format=LAYOUTS[layout]).requires_grad_()
    targets = torch.randint(SIDE**2, (rois, POINTS), generator=g)
    targets[torch.rand(rois, POINTS, generator=g) > LABELLED] = -1
    labelled = int((targets >= 0).sum())
    targets = targets.to(comparison.device)

    def torchvision_loss() -> Tensor:
        valid = torch.where(targets.flatten() >= 0)[0]
        return F.cross_entropy(heatmaps.view(rois * POINTS, -1).float()[valid], targets.flatten()[valid])

    def cross_entropy() -> Tensor:  # without a synchronisation
        return F.cross_entropy(heatmaps.flatten(0, 1).flatten(1).float(), targets.flatten(), ignore_index=-1)

    def forward_and_backward(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss.detach(), torch.autograd.grad(loss, heatmaps)[0]

    def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
        tolerance = {torch.float32: 1e-4}.get(heatmaps.dtype, 2e-2)
        return all(torch.allclose(a, b, rtol=tolerance, atol=1e-7) for a, b in zip(actual, expected, strict=True))

    peer = torchvision_loss if heatmaps.is_contiguous() else cross_entropy
    comparison.run(
        name,
        {
            FASTMASK: lambda: forward_and_backward(fastmask.keypoint_loss(heatmaps, targets)),
            "torchvision": lambda: forward_and_backward(peer()),
        },
        same,
        bytes=2 * labelled * SIDE**2 * heatmaps.itemsize + heatmaps.nbytes + targets.nbytes,
        flops=8 * labelled * SIDE**2,
        **options,
    )


@pytest.mark.parametrize(
    ("dtype", "layout"),
    parameters(
        [(dtype, layout) for dtype in ("float32", "bfloat16") for layout in LAYOUTS],
        quick=lambda dtype, layout: (dtype, layout) == ("float32", "NCHW"),
    ),
)
def bench_training(comparison, dtype, layout):
    name = f"{ROIS} RoIs 17x56x56, forward + backward, {dtype}, {layout}"
    compare_with_torch(comparison, name, dtype=dtype, layout=layout)


@pytest.mark.parametrize("rois", [8, 32, 512])
def bench_rois(comparison, rois):
    options: CaseOptions = {"kind": "scaling", "axis": "RoIs", "at": rois}
    name = f"{rois:,} RoIs 17x56x56, forward + backward"
    compare_with_torch(comparison, name, rois=rois, dtype="float32", layout="NCHW", **options)


def _calls(device: str, seed: int) -> list[Call]:
    heatmaps, targets = (tensor.to(device) for tensor in draw_heatmaps(2, 3, 5, seed))
    last = heatmaps.to(memory_format=torch.channels_last, copy=True).requires_grad_()
    return [
        Call(fastmask.keypoint_loss, {"heatmaps": heatmaps.requires_grad_(), "targets": targets}),
        Call(fastmask.keypoint_loss, {"heatmaps": last, "targets": targets, "reduction": "sum"}),
    ]


def _compile_case(dtype: str, *, channels_last: bool) -> Call:
    heatmaps = meta(ROIS, POINTS, SIDE, SIDE, dtype=DTYPES[dtype], channels_last=channels_last).requires_grad_()
    return Call(fastmask.keypoint_loss, {"heatmaps": heatmaps, "targets": meta(ROIS, POINTS, dtype=torch.int64)})


def _check_random(draw: Draw, device: str) -> None:
    rows, points, m = draw.integer(1, 4), draw.integer(1, 18), draw.integer(1, 9)
    heatmaps, targets = draw_heatmaps(rows, points, m, draw.integer(0, 10**6))
    layout = draw.choice(list(LAYOUTS.values()))
    assert_keypoint_loss(device, heatmaps.to(memory_format=layout), targets, draw.choice(["mean", "sum"]))


OPERATOR = Operator(
    calls=_calls,
    compile_cases={
        "128 RoIs 17x56x56, NCHW, float32": partial(_compile_case, "float32", channels_last=False),
        "128 RoIs 17x56x56, channels_last, float32": partial(_compile_case, "float32", channels_last=True),
        "128 RoIs 17x56x56, channels_last, bfloat16": partial(_compile_case, "bfloat16", channels_last=True),
    },
    limits={
        "_keypoint_loss_kernel": {"cuda": Limit(64, slow_paths=0, occupancy=0.5), "hip": Limit(40)},
        "_keypoint_loss_backward_kernel": {
            "cuda": Limit(56, wide_loads=True, wide_stores=True, slow_paths=0),
            "hip": Limit(32),
        },
        "_reduce_loss_kernel": model_losses.REDUCE_LIMIT,
    },
    check_random=_check_random,
    variants=VARIANTS,
    models=model_losses.KEYPOINT_MODELS,
    targets=model_losses.KEYPOINT_TARGETS,
)
