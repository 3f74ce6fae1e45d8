"""The mask loss of a training step: 256 RoIs, 80 classes of 28 x 28 logits (He et al. 2017, §3), forward and backward.

Bytes: the logits of each row's class and the targets read, the gradient of all logits written. FLOPs: ten for each
pixel of each row.
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
from benchmarks.harness.workloads import CLASSES, DTYPES, LAYOUTS, generator
from benchmarks.reporting.results import FASTMASK
from tests.oracles.mask_loss import VARIANTS, assert_mask_loss, draw_masks

ROIS, SIDE = 256, 28


def compare_with_torch(
    comparison: Comparison, name: str, *, rois: int = ROIS, dtype: str, layout: str, **options: Unpack[CaseOptions]
) -> None:
    """Compare with PyTorch's loss of gathered logits, as torchvision computes it, and its autograd."""
    g = generator()
    logits = torch.randn(rois, CLASSES, SIDE, SIDE, generator=g).to(
        comparison.device, DTYPES[dtype], memory_format=LAYOUTS[layout]
    )
    logits.requires_grad_()
    targets = torch.rand(rois, SIDE, SIDE, generator=g).round().to(comparison.device)
    labels = torch.randint(1, CLASSES + 1, (rois,), generator=g).to(comparison.device)
    row = torch.arange(rois, device=comparison.device)

    def gathered() -> Tensor:
        return F.binary_cross_entropy_with_logits(logits[row, labels - 1].float(), targets)

    def forward_and_backward(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
        tolerance = {torch.float32: 1e-5}.get(logits.dtype, 1e-2)
        return all(torch.allclose(a, b, rtol=tolerance, atol=1e-8) for a, b in zip(actual, expected, strict=True))

    comparison.run(
        name,
        {
            FASTMASK: lambda: forward_and_backward(fastmask.mask_loss(logits, targets, labels)),
            "torchvision": lambda: forward_and_backward(gathered()),
        },
        same,
        bytes=targets.numel() * logits.itemsize + targets.nbytes + labels.nbytes + logits.nbytes,
        flops=targets.numel() * 10,
        **options,
    )


@pytest.mark.parametrize(
    ("dtype", "layout"),
    parameters(
        [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS],
        quick=lambda dtype, layout: (dtype, layout) == ("float32", "channels_last"),
    ),
)
def bench_training(comparison, dtype, layout):
    name = f"{ROIS} RoIs 28x28, forward + backward, {dtype}, {layout}"
    compare_with_torch(comparison, name, dtype=dtype, layout=layout)


@pytest.mark.parametrize("rois", [16, 64, 1024])
def bench_rois(comparison, rois):
    options: CaseOptions = {"kind": "scaling", "axis": "RoIs", "at": rois}
    name = f"{rois:,} RoIs 28x28, forward + backward"
    compare_with_torch(comparison, name, rois=rois, dtype=comparison.main_dtype, layout="channels_last", **options)


def _calls(device: str, seed: int) -> list[Call]:
    logits, *rest = draw_masks(3, 4, 5, seed)
    targets, labels, valid = (tensor.to(device) for tensor in rest)
    logits = logits.to(device)
    last = logits.to(memory_format=torch.channels_last, copy=True).requires_grad_()
    arguments = {"targets": targets, "labels": labels, "valid": valid}
    return [
        Call(fastmask.mask_loss, {"logits": last, **arguments}),
        Call(fastmask.mask_loss, {"logits": logits.requires_grad_(), **arguments, "reduction": "sum"}),
    ]


def _compile_case(dtype: str, *, channels_last: bool = True, classes: int = CLASSES) -> Call:
    logits = meta(ROIS, classes, SIDE, SIDE, dtype=DTYPES[dtype], channels_last=channels_last).requires_grad_()
    rows = {"labels": meta(ROIS, dtype=torch.int64), "valid": meta(ROIS, dtype=torch.bool)}
    return Call(fastmask.mask_loss, {"logits": logits, "targets": meta(ROIS, SIDE, SIDE), **rows})


def _check_random(draw: Draw, device: str) -> None:
    rows, classes, m = draw.integer(1, 6), draw.integer(1, 20), draw.integer(1, 9)
    logits, targets, labels, valid = draw_masks(rows, classes, m, draw.integer(0, 10**6))
    layout = draw.choice(list(LAYOUTS.values()))
    assert_mask_loss(device, logits.to(memory_format=layout), targets, labels, valid, draw.choice(["mean", "sum"]))


OPERATOR = Operator(
    calls=_calls,
    compile_cases={
        "256 RoIs 28x28, 80 classes, bfloat16": partial(_compile_case, "bfloat16"),
        "256 RoIs 28x28, 80 classes, float32": partial(_compile_case, "float32"),
        "256 RoIs 28x28, 80 classes, NCHW, bfloat16": partial(_compile_case, "bfloat16", channels_last=False),
        "256 RoIs 28x28, 91 classes, bfloat16": partial(_compile_case, "bfloat16", classes=91),
    },
    limits={
        "_mask_loss_kernel": {"cuda": Limit(40, slow_paths=0), "hip": Limit(56)},
        "_mask_loss_backward_kernel": {
            "cuda": Limit(48, wide_stores=True, slow_paths=0),
            "hip": Limit(32, wide_stores=True),
        },
        "_reduce_loss_kernel": model_losses.REDUCE_LIMIT,
    },
    check_random=_check_random,
    variants=VARIANTS,
    models=model_losses.MASK_MODELS,
    targets=model_losses.MASK_TARGETS,
)
