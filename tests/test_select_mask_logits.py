"""select_mask_logits against a convolution to all classes; wrong arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels.select_mask_logits import select_mask_logits
from tests.oracles.select_mask_logits import assert_logits, draw_features

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_matches_the_oracle(device, dtype, layout, relu):
    features, *rest = draw_features(3, 20, 7)
    assert_logits(device, features.to(dtype).to(memory_format=layout), *rest, relu)


@layouts
@pytest.mark.parametrize(("rois", "channels", "m", "classes"), [(3, 1, 5, 2), (2, 256, 2, 80), (2, 3, 1, 1)])
def test_sizes(device, layout, rois, channels, m, classes):
    features, weight, bias, labels = draw_features(rois, channels, m, classes)
    labels[-1] = classes
    assert_logits(device, features.to(memory_format=layout), weight, bias, labels)


def test_is_the_channel_of_a_convolution(device):
    features, weight, bias, labels = on(device, *draw_features())
    labels[2] = 5
    expected = F.conv2d(features.relu(), weight, bias)[torch.arange(4, device=device), labels - 1]
    for one in (weight, weight[:, :, 0, 0]):
        torch.testing.assert_close(select_mask_logits(features, one, bias, labels, relu=True), expected)


def test_empty_slots_are_not_read(device):
    features, weight, bias, labels = on(device, *draw_features())
    features[2] = torch.nan
    out = select_mask_logits(features, weight, bias, labels)
    assert out.isfinite().all()
    assert (out[2] == 0).all()
    assert not select_mask_logits(features, weight, bias, labels * 0).any()


def test_nan_passes_the_relu(device):
    features, weight, bias, labels = on(device, *draw_features())
    features[0, 2, 1, 1] = torch.nan
    out = select_mask_logits(features, weight, bias, labels, relu=True)
    assert out[0, 1, 1].isnan()
    assert out.isnan().sum() == 1


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 0)])
def test_empty(device, shape):
    _, weight, bias, _ = on(device, *draw_features())
    labels = torch.ones(shape[0], dtype=torch.long, device=device)
    out = select_mask_logits(torch.empty(shape, device=device), weight, bias, labels)
    assert out.shape == (shape[0], *shape[2:])


@layouts
def test_non_contiguous(device, layout):
    features, weight, bias, labels = on(device, *draw_features())
    features = features.to(memory_format=layout)
    expected = select_mask_logits(features, weight, bias, labels)
    wide = torch.cat([features, features], 3)[..., :6]
    weight = torch.stack([weight, weight], 4)[..., 0]
    tensors = [torch.stack([tensor, tensor], 1)[:, 0] for tensor in (bias, labels)]
    torch.testing.assert_close(select_mask_logits(wide, weight, *tensors), expected)


@pytest.mark.reference_only
@layouts
def test_at_full_size(layout):
    features, weight, bias, labels = draw_features(9, 256, 28, 80)
    labels[3] = 0
    assert_logits("cpu", features.to(memory_format=layout), weight, bias, labels, relu=True)


@layouts
def test_bitwise_repeatable(device, layout):
    features, weight, bias, labels = on(device, *draw_features())
    features = features.to(memory_format=layout)
    first, second = (select_mask_logits(features, weight, bias, labels) for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_changes_nothing(device):
    features, weight, bias, labels = on(device, *draw_features())
    expected = select_mask_logits(features, weight, bias, labels)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(select_mask_logits(features, weight, bias, labels), expected)


def test_has_no_backward(device):
    features, weight, bias, labels = on(device, *draw_features())
    out = select_mask_logits(features, weight.requires_grad_(), bias, labels)
    with pytest.raises(NotImplementedError, match="inference"):
        out.sum().backward()


@layouts
@pytest.mark.parametrize("relu", [False, True])
def test_opcheck(device, layout, relu):
    features, weight, bias, labels = on(device, *draw_features())
    arguments = features.to(memory_format=layout), weight.flatten(1), bias, labels, relu
    torch.library.opcheck(torch.ops.fastmask.select_mask_logits.default, arguments)


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(select_mask_logits, fullgraph=True, dynamic=True)
    for rois, m in ((3, 4), (4, 6)):
        arguments = on(device, *draw_features(rois, 8, m))
        assert torch.equal(compiled(*arguments, relu=True), select_mask_logits(*arguments, relu=True))


def test_fake_tensors():
    with FakeTensorMode():
        features = torch.rand(4, 256, 28, 28, dtype=torch.bfloat16)
        arguments = torch.rand(80, 256), torch.rand(80), torch.ones(4, dtype=torch.long)
        out = select_mask_logits(features, *arguments)
        assert (out.shape, out.dtype) == ((4, 28, 28), torch.float32)


@pytest.mark.reference_only
def test_labels_without_a_class_raise_on_the_cpu():
    features, weight, bias, labels = draw_features()
    for label in (-1, 6):
        labels[0] = label
        with pytest.raises(ValueError, match=f"labels: expected 0..5, got {label}"):
            select_mask_logits(features, weight, bias, labels)


FEATURES, WEIGHT, BIAS, LABELS = draw_features()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "features: expected a floating dtype", (FEATURES.long(), WEIGHT, BIAS, LABELS), {}),
        (ValueError, r"features: expected \[R, C, h, w\]", (FEATURES[0], WEIGHT, BIAS, LABELS), {}),
        (ValueError, r"features: expected \[R, C, h, w\]", (FEATURES[:, :0], WEIGHT[:, :0], BIAS, LABELS), {}),
        (ValueError, r"weight: expected \[K, 8\].*\[5, 7, 1, 1\]", (FEATURES, WEIGHT[:, :7], BIAS, LABELS), {}),
        (ValueError, r"weight: expected \[K, 8\].*\[5, 8, 1\]", (FEATURES, WEIGHT[..., 0], BIAS, LABELS), {}),
        (ValueError, r"weight: expected \[K, 8\].*\[0, 8, 1, 1\]", (FEATURES, WEIGHT[:0], BIAS[:0], LABELS), {}),
        (ValueError, r"bias: expected \[5\].*\[4\]", (FEATURES, WEIGHT, BIAS[:4], LABELS), {}),
        (TypeError, "bias: expected a Tensor, got None", (FEATURES, WEIGHT, None, LABELS), {}),
        (ValueError, r"labels: expected \[4\].*\[3\]", (FEATURES, WEIGHT, BIAS, LABELS[:3]), {}),
        (TypeError, "labels: expected an integer dtype", (FEATURES, WEIGHT, BIAS, LABELS.float()), {}),
        (ValueError, "weight: expected on cpu", (FEATURES, WEIGHT.to("meta"), BIAS, LABELS), {}),
        (TypeError, "relu: expected a bool", (FEATURES, WEIGHT, BIAS, LABELS), {"relu": "yes"}),
    ],
)
def test_bad_arguments_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        select_mask_logits(*arguments, **options)
