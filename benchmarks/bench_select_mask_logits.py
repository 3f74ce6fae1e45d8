"""The mask head's last layer at inference: 100 RoIs of 28 x 28, 256 channels, the predicted one of 80 classes.

Bytes: the features read once, one logit per pixel written. FLOPs: a multiply-add for each feature.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmask
from benchmarks import model_select_mask_logits
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.operators import Call, Draw, Limit, Operator, meta
from benchmarks.harness.workloads import CHANNELS, CLASSES, DTYPES, LAYOUTS, generator
from benchmarks.reporting.results import FASTMASK
from tests.oracles.select_mask_logits import VARIANTS, assert_logits, draw_features

ROIS, SIDE = 100, 28


def compare_with_convolution(
    comparison: Comparison,
    name: str,
    *,
    rois: int = ROIS,
    dtype: str,
    layout: str,
    relu: bool = True,
    **options: Unpack[CaseOptions],
) -> None:
    """Compare with a convolution to all classes, from which the predicted one is taken, as torchvision does."""
    g, to = generator(), partial(torch.Tensor.to, device=comparison.device, dtype=DTYPES[dtype])
    features = to(torch.randn(rois, CHANNELS, SIDE, SIDE, generator=g)).to(memory_format=LAYOUTS[layout])
    weight, bias = to(torch.randn(CLASSES, CHANNELS, 1, 1, generator=g) / 16), to(torch.randn(CLASSES, generator=g))
    labels = torch.randint(1, CLASSES + 1, (rois,), generator=g).to(comparison.device)
    row = torch.arange(rois, device=comparison.device)

    def convolution() -> Tensor:
        return F.conv2d(F.relu(features) if relu else features, weight, bias)[row, labels - 1].float()

    def same(actual: Tensor, expected: Tensor) -> bool:
        tolerance = {torch.float32: 1e-5}.get(features.dtype, 2e-2)
        return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())

    comparison.run(
        name,
        {
            FASTMASK: lambda: fastmask.select_mask_logits(features, weight, bias, labels, relu=relu),
            "torchvision": convolution,
        },
        same,
        bytes=features.nbytes + weight.nbytes + rois * SIDE**2 * 4,
        flops=2 * features.numel(),
        **options,
    )


@pytest.mark.parametrize(
    ("dtype", "layout"),
    parameters(
        [(dtype, layout) for dtype in ("float32", "bfloat16") for layout in LAYOUTS],
        quick=lambda dtype, layout: (dtype, layout) == ("float32", "channels_last"),
    ),
)
def bench_inference(comparison, dtype, layout):
    name = f"{ROIS} RoIs 28x28, with ReLU, {dtype}, {layout}"
    compare_with_convolution(comparison, name, dtype=dtype, layout=layout)


def bench_without_relu(comparison):
    name = f"{ROIS} RoIs 28x28"
    compare_with_convolution(comparison, name, dtype=comparison.main_dtype, layout="channels_last", relu=False)


@pytest.mark.parametrize("rois", [10, 400])
def bench_rois(comparison, rois):
    options: CaseOptions = {"kind": "scaling", "axis": "RoIs", "at": rois}
    name, dtype = f"{rois} RoIs 28x28, with ReLU", comparison.main_dtype
    compare_with_convolution(comparison, name, rois=rois, dtype=dtype, layout="channels_last", **options)


def _calls(device: str, seed: int) -> list[Call]:
    features, weight, bias, labels = (tensor.to(device) for tensor in draw_features(3, 8, 4, seed=seed))
    last = features.to(memory_format=torch.channels_last, copy=True)
    arguments = {"weight": weight, "bias": bias, "labels": labels}
    return [
        Call(fastmask.select_mask_logits, {"features": features, **arguments}),
        Call(fastmask.select_mask_logits, {"features": last, **arguments, "relu": True}),
    ]


def _compile_case(dtype: str, *, channels_last: bool = True, channels: int = CHANNELS) -> Call:
    options = {
        "features": meta(ROIS, channels, SIDE, SIDE, dtype=DTYPES[dtype], channels_last=channels_last),
        "weight": meta(CLASSES, channels, 1, 1, dtype=DTYPES[dtype]),
        "bias": meta(CLASSES, dtype=DTYPES[dtype]),
        "labels": meta(ROIS, dtype=torch.int64),
    }
    return Call(fastmask.select_mask_logits, options | {"relu": True})


def _check_random(draw: Draw, device: str) -> None:
    rois, channels, m, classes = draw.integer(1, 4), draw.integer(1, 40), draw.integer(1, 9), draw.integer(1, 9)
    features, *rest = draw_features(rois, channels, m, classes, draw.integer(0, 10**6))
    layout = draw.choice(list(LAYOUTS.values()))
    assert_logits(device, features.to(memory_format=layout), *rest, relu=draw.choice([False, True]))


OPERATOR = Operator(
    calls=_calls,
    compile_cases={
        "100 RoIs 28x28, 256 channels, bfloat16": partial(_compile_case, "bfloat16"),
        "100 RoIs 28x28, 256 channels, float32": partial(_compile_case, "float32"),
        "100 RoIs 28x28, 256 channels, NCHW, bfloat16": partial(_compile_case, "bfloat16", channels_last=False),
        "100 RoIs 28x28, 300 channels, bfloat16": partial(_compile_case, "bfloat16", channels=300),
    },
    limits={
        "_select_mask_logits_kernel": {
            "cuda": Limit(72, wide_loads=True, slow_paths=0, for_cases={"300 channels": Limit(72, slow_paths=0)}),
            "hip": Limit(64),
        }
    },
    check_random=_check_random,
    variants=VARIANTS,
    models=model_select_mask_logits.MODELS,
    targets=model_select_mask_logits.TARGETS,
)
