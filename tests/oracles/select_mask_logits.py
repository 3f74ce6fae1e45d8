"""Random features, `F.conv2d` to all classes in float64, and the variants of the kernel of `select_mask_logits`."""

from functools import partial

import torch
import torch.nn.functional as F

from fastmask.kernels.select_mask_logits import select_mask_logits
from tests.oracles.budget import assert_within_budget


def draw_features(rois=4, channels=8, m=6, classes=5, seed=0):
    """Features, weight, bias, and labels of which one is an empty slot."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(rois, channels, m, m, generator=g)
    weight, bias = torch.randn(classes, channels, 1, 1, generator=g), torch.randn(classes, generator=g)
    labels = torch.randint(1, classes + 1, (rois,), generator=g)
    labels[rois // 2] = 0
    return features, weight, bias, labels


def exact_logits(features, weight, bias, labels, relu=False):
    """The logits in float64 by a convolution, and the magnitudes of their terms."""
    features = features.double().relu() if relu else features.double()
    weight, bias = weight.double(), bias.double()
    index = (labels - 1).clamp(min=0)[:, None, None, None]
    with_class = (labels > 0)[:, None, None]

    def of_class(all_logits):
        return all_logits.take_along_dim(index, 1)[:, 0] * with_class

    exact = of_class(F.conv2d(features, weight, bias))
    return exact, of_class(F.conv2d(features.abs(), weight.abs(), bias.abs()))


def assert_logits(device, features, weight, bias, labels, relu=False):
    exact, magnitude = exact_logits(features, weight, bias, labels, relu)
    tensors = [tensor.to(device) for tensor in (features, weight, bias, labels)]
    actual = select_mask_logits(*tensors, relu=relu)
    assert actual.dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32)
    assert_within_budget(actual, exact, magnitude)
    assert (actual.cpu()[labels == 0] == 0).all()


def check_logits(
    device,
    dtype=torch.float32,
    layout=torch.channels_last,
    rois=4,
    channels=8,
    m=6,
    relu=False,
    weight_dtype=torch.float32,
):
    """A small call."""
    features, weight, bias, labels = draw_features(rois, channels, m)
    features = features.to(dtype).to(memory_format=layout)
    assert_logits(device, features, weight.to(weight_dtype), bias.to(weight_dtype), labels, relu)


# By name: asserts that a small call of one variant of the kernel agrees with the oracle.
VARIANTS = {
    **{
        f"{name}, {str(dtype).removeprefix('torch.')}": partial(check_logits, dtype=dtype, layout=layout)
        for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    },
    "ReLU": partial(check_logits, relu=True),
    "ReLU, contiguous, bfloat16": partial(
        check_logits, relu=True, layout=torch.contiguous_format, dtype=torch.bfloat16
    ),
    "weight in bfloat16": partial(check_logits, dtype=torch.bfloat16, weight_dtype=torch.bfloat16),
    "several steps of channels": partial(check_logits, channels=70, m=3),
    "several steps of channels, contiguous": partial(check_logits, channels=64, m=3, layout=torch.contiguous_format),
    "several programs of a RoI": partial(check_logits, m=9),
}
