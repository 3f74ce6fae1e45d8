"""roi_pool against torchvision, bit for bit, and integer arithmetic; layouts, gradients, degenerate boxes, tracing."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torchvision.ops import roi_pool as torchvision_roi_pool

from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.roi_pool import reference, roi_pool
from fastmask.kernels.roi_pool.geometry import quantise
from fastmask.kernels.roi_pool.op import RoIPoolSpec
from tests.oracles.budget import assert_within_budget
from tests.oracles.roi_pool import (
    assert_like_torchvision,
    draw_features_and_boxes,
    exact_pool,
    forward_backward,
)

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LOWEST = torch.finfo(torch.float32).min


def test_hand_table(device):
    features = torch.arange(20.0, device=device).view(1, 1, 4, 5)
    boxes = torch.tensor([[0.0, 0, 0, 3, 3], [0, 2.5, 0.5, 3.4, 1.4], [0, -9, -9, 0, 0]], device=device)
    expected = [[[6, 8], [16, 18]], [[8, 8], [8, 8]], [[0, 0], [0, 0]]]  # the second rounds to pixel (1, 3)
    assert roi_pool(features, boxes, 2).cpu()[:, 0].tolist() == expected
    assert roi_pool(features, boxes * 16, (1, 2), 1 / 16)[0].flatten().tolist() == [16, 18]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "size", "scale"),
    [((2, 3, 9, 7), (3, 2), 1.0), ((1, 17, 6, 5), (2, 4), 0.37), ((1, 1, 1, 1), (1, 1), 2.0)],
)
def test_matches_torchvision_bit_for_bit(device, shape, size, scale, dtype):
    features, boxes = draw_features_and_boxes(*shape, boxes=5, seed=sum(shape), dtype=dtype)
    boxes[:, 1:] /= scale
    assert_like_torchvision(device, features, boxes, size, scale)


@pytest.mark.reference_only
def test_many_boxes_in_chunks_match_torchvision(monkeypatch):
    features, boxes = draw_features_and_boxes(3, 8, 40, 50, boxes=300, seed=0)
    assert_like_torchvision("cpu", features, boxes * torch.tensor([1.0, 16, 16, 16, 16]), (7, 7), 1 / 16)
    monkeypatch.setattr(reference, "MAX_FEATURES", 1000)
    monkeypatch.setattr(reference, "MAX_GRADIENTS", 1000)
    assert_like_torchvision("cpu", features, boxes, (7, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boxes_dtype", [torch.float16, torch.float64])
def test_every_dtype_is_exact(device, dtype, boxes_dtype):
    features, boxes = draw_features_and_boxes(2, 5, 6, 9, boxes=4, seed=3, dtype=dtype)
    boxes = boxes.round()
    output, argmax = exact_pool(features, boxes, (2, 4))
    features, grad = features.to(device).requires_grad_(), torch.randn(4, 5, 2, 4).to(device, dtype)
    actual = roi_pool(features, boxes.to(device, boxes_dtype), (2, 4))
    actual.backward(grad)
    assert actual.dtype == dtype
    assert torch.equal(actual.cpu(), output)
    sums, magnitudes = torch.zeros(2, 2, 5, 6 * 9, dtype=torch.float64)
    for k, image in enumerate(boxes[:, 0].long()):
        won = argmax[k].flatten(1)
        terms = grad[k].cpu().double().flatten(1) * (won >= 0)
        sums[image].scatter_add_(1, won.clamp(min=0).long(), terms)
        magnitudes[image].scatter_add_(1, won.clamp(min=0).long(), terms.abs())
    assert (argmax == -1).any()
    assert_within_budget(features.grad, sums.view(2, 5, 6, 9), magnitudes.view(2, 5, 6, 9))


def test_operator_returns_the_argmax(device):
    features, boxes = draw_features_and_boxes(1, 3, 7, 6, boxes=3, seed=5)
    boxes = boxes.round()
    _, expected = exact_pool(features, boxes, (2, 2))
    _, argmax = torch.ops.fastmask.roi_pool([features.to(device)], boxes.to(device), *RoIPoolSpec(2, 2, [1.0]))
    assert argmax.dtype == torch.int32
    assert torch.equal(argmax.cpu(), expected)


def test_first_of_equals_wins(device):
    features = torch.ones(1, 2, 5, 6, device=device, requires_grad=True)
    boxes = torch.tensor([[0.0, 1, 2, 4, 4], [0, 2, 2, 2, 3]], device=device)
    roi_pool(features, boxes, 1).sum().backward()  # a gradient of stride 0
    expected = torch.zeros(5, 6)
    expected[2, 1] = expected[2, 2] = 1
    assert torch.equal(features.grad.cpu(), expected.expand(1, 2, 5, 6))


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_layout_follows_the_input(device, channels):
    features, boxes = draw_features_and_boxes(2, channels, 6, 5, boxes=3, seed=channels)
    features, boxes = features.to(device), boxes.to(device)
    grad = torch.randn(3, channels, 2, 3, device=device)
    wide = torch.zeros(2, channels, 6, 10, device=device)
    wide[..., ::2] = features
    expected = forward_backward(roi_pool, features, boxes, grad, (2, 3))
    assert all(tensor.is_contiguous() for tensor in expected)
    last = features.contiguous(memory_format=torch.channels_last)
    actual = forward_backward(roi_pool, last, boxes, grad, (2, 3))
    for tensor, contiguous in zip(actual, expected, strict=True):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(tensor, contiguous)
    for strided in (wide[..., ::2], features.mT.contiguous().mT):
        actual = forward_backward(roi_pool, strided, boxes, grad, (2, 3))
        assert all(map(torch.equal, actual, expected))
    columns = torch.zeros(3, 7, device=device)
    columns[:, 1:6] = boxes
    assert torch.equal(roi_pool(features, columns[:, 1:6], (2, 3)), expected[0])


def test_features_that_are_not_finite(device):
    features = torch.full((1, 1, 2, 6), NAN)
    features[0, 0, :, 1] = 7.0
    features[0, 0, :, 2:4] = -INF
    features[0, 0, 0, 5] = INF
    boxes = torch.tensor([[0.0, 0, 0, 5, 1]])
    assert_like_torchvision(device, features, boxes, (1, 3))
    output = roi_pool(features.to(device), boxes.to(device), (1, 3))
    assert output.flatten().tolist() == [7, LOWEST, INF]


@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_and_non_finite_boxes(device, dtype):
    features, _ = draw_features_and_boxes(1, 2, 4, 5, boxes=0, seed=0, dtype=dtype)
    bad = [[0, NAN, 0, 1, 1], [0, 0, 0, INF, 1], [0, 0, -INF, 1, 1], [0, 0, 0, 1, NAN]]
    empty = [[0, 1e30, 1e30, 1e31, 1e31], [0, -1e20, 0, -1e19, 1], [0, 9, 0, -9, 3]]
    everything = [[0, -1e18, -1e18, 1e18, 1e18], [0, -0.5, -0.4, 4.4, 4]]
    boxes = torch.tensor(bad + empty + everything, dtype=torch.float64, device=device)
    grad = torch.ones(len(boxes), 2, 1, 1)
    output, gradient = forward_backward(roi_pool, features.to(device), boxes, grad, 1)
    assert not output[:7].any()
    assert torch.equal(output[7:].cpu(), features.amax((2, 3))[:, :, None, None].expand(2, -1, -1, -1))
    assert torch.equal(gradient.cpu(), 2 * (features == features.amax((2, 3), keepdim=True)))


def test_large_boxes_are_torchvisions(device):
    features, _ = draw_features_and_boxes(1, 2, 5, 6, boxes=0, seed=1)
    boxes = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [0, -1e9, 1, 3, 2], [0, 2, -3, 1e8, 9]])
    assert_like_torchvision(device, features, boxes, (2, 3))


@pytest.mark.parametrize("index", [-1.0, 2.0, NAN, INF, 3e9])
def test_batch_index_out_of_range(device, index):
    boxes = torch.tensor([[1.0, 0, 0, 3, 3], [index, 0, 0, 3, 3]], device=device)
    features = torch.ones(2, 1, 4, 4, device=device, requires_grad=True)
    if device == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match=r"boxes: expected image indices in \[0, 2\)"):
            roi_pool(features, boxes, 2)
    else:  # to raise, an accelerator would have to synchronise with the host
        output = roi_pool(features, boxes, 2)
        output.sum().backward()
        assert output.flatten().tolist() == [1] * 4 + [0] * 4
        assert features.grad.sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_are_rounded_as_c_does(dtype):
    below_half = torch.tensor(0.5, dtype=dtype).nextafter(torch.tensor(0.0, dtype=dtype)).item()
    halves = [0.5, -0.5, 1.5, 2.5, -2.5, below_half, -below_half, 1e9]
    boxes = torch.zeros(len(halves), 5, dtype=dtype)
    boxes[:, 1] = boxes[:, 3] = torch.tensor(halves, dtype=dtype)
    x1, y1, width, height = quantise(boxes, 1.0)
    assert x1.tolist() == [1, -1, 2, 3, -3, 0, 0, 10**9]
    assert y1.tolist() == [0] * len(halves)
    assert width.tolist() == height.tolist() == [1] * len(halves)
    boxes = torch.tensor([[0, 2, 3, 5, 3], [0, 2, 3, 0, 1], [0, NAN, 3, 0, 1], [0, 2, 3, INF, 1]], dtype=dtype)
    _, _, width, height = quantise(boxes, 2.0)
    assert width.tolist() == [7, 1, 0, 0]
    assert height.tolist() == [1, 1, 0, 0]


def test_kernel_rounds_just_below_a_half_down(device):
    features = torch.arange(3.0, device=device).view(1, 1, 1, 3)
    boxes = torch.tensor([[0, x, 0, x, 0] for x in (0.49999997, 0.5, 1.5, -0.5)], device=device)
    assert roi_pool(features, boxes, 1).flatten().tolist() == [0, 1, 2, 0]


def test_nothing_to_pool(device):
    features = torch.rand(2, 3, 4, 5, device=device, requires_grad=True)
    none = torch.zeros(0, 4, device=device)
    for boxes in (torch.zeros(0, 5, device=device), [none, none], [none], []):
        output = roi_pool(features, boxes, (2, 3))
        assert output.shape == (0, 3, 2, 3)
        (gradient,) = torch.autograd.grad(output.sum(), features)
        assert not gradient.any()
    box = torch.tensor([[0.0, 0, 0, 3, 3]], device=device)
    for shape in ((1, 0, 4, 5), (1, 2, 0, 5), (1, 2, 4, 0)):
        features = torch.zeros(shape, device=device, requires_grad=True)
        output = roi_pool(features, box, 2)
        output.sum().backward()
        assert torch.equal(output.cpu(), torch.zeros(1, shape[1], 2, 2))
        assert features.grad.shape == shape


def test_list_of_boxes(device):
    features, boxes = draw_features_and_boxes(3, 2, 5, 5, boxes=4, seed=2)
    boxes[:, 0] = torch.tensor([0, 0, 2, 2])
    features, boxes = features.to(device), boxes.to(device)
    per_image = [boxes[:2, 1:], boxes[:0, 1:], boxes[2:, 1:]]
    assert torch.equal(roi_pool(features, per_image, 2), roi_pool(features, boxes, 2))
    assert torch.equal(roi_pool(features, per_image[:2], 2), roi_pool(features, boxes[:2], 2))


@pytest.mark.reference_only
def test_half_precision_lists_know_their_image():
    features = torch.arange(258.0).view(258, 1, 1, 1)
    boxes = [torch.zeros(1, 4, dtype=torch.bfloat16)] * 258  # bfloat16 goes from 256 to 258
    assert torch.equal(roi_pool(features, boxes, 1), features)


@pytest.mark.reference_only
def test_gradients_of_both_orders():
    features, boxes = draw_features_and_boxes(2, 1, 3, 4, boxes=3, seed=8, dtype=torch.float64)
    boxes[:, 1:] += 0.01
    features.requires_grad_()
    assert gradcheck(lambda x: roi_pool(x, boxes, (2, 3)), features)
    assert gradgradcheck(lambda x: roi_pool(x, boxes, (2, 3)), features)


def test_second_derivative_gathers_from_the_argmax(device):
    features, boxes = draw_features_and_boxes(2, 3, 4, 5, boxes=3, seed=9)
    features, boxes = features.to(device).requires_grad_(), boxes.to(device)
    output, argmax = torch.ops.fastmask.roi_pool([features], boxes, *RoIPoolSpec(2, 2, [1.0]))
    grad = torch.randn_like(output).requires_grad_()
    (gradient,) = torch.autograd.grad(output, features, grad, create_graph=True)
    direction = torch.randn_like(gradient)
    (actual,) = torch.autograd.grad(gradient, grad, direction)
    picked = direction[boxes[:, 0].long()].flatten(2).gather(2, argmax.clamp(min=0).long().flatten(2))
    assert torch.equal(actual, picked.view_as(actual).where(argmax >= 0, 0))


def test_backward_is_deterministic(device):
    count = 130  # more than a program that lists boxes reads in one step
    features, boxes = draw_features_and_boxes(1, 2, 3, 4, boxes=count, seed=4)
    boxes[:, 1:] = torch.tensor([0.0, 0, 2, 2]) + torch.arange(count)[:, None] % 2
    grad = torch.randn(count, 2, 1, 1) * torch.logspace(-6, 6, count)[:, None, None, None]
    features, boxes = features.to(device), boxes.to(device)
    first = forward_backward(roi_pool, features, boxes, grad, 1)
    again = forward_backward(roi_pool, features, boxes, grad, 1)
    in_order = forward_backward(torchvision_roi_pool, features.cpu(), boxes.cpu(), grad, 1)
    for a, b, c in zip(first, again, in_order, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.cpu(), c)


def test_autocast_keeps_half_precision(device):
    features, boxes = draw_features_and_boxes(1, 4, 5, 5, boxes=2, seed=6, dtype=torch.bfloat16)
    features, boxes = features.to(device).requires_grad_(), boxes.to(device)
    with torch.autocast(device, torch.bfloat16):
        output = roi_pool(features, boxes, 2)
    output.sum().backward()
    assert output.dtype == features.grad.dtype == torch.bfloat16
    assert torch.equal(output, roi_pool(features, boxes, 2))


@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_are_registered_in_full(device, channels_last):
    features, boxes = draw_features_and_boxes(2, 3, 4, 4, boxes=2, seed=7)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = features.to(device, memory_format=layout).requires_grad_()
    boxes = boxes.to(device)
    levels = [features, features.detach()[:, :, ::2, :3].contiguous(memory_format=layout).requires_grad_()]
    spec = RoIPoolSpec(2, 2, [0.5, 0.25], canonical_box_size=4.0)
    torch.library.opcheck(torch.ops.fastmask.roi_pool.default, (levels, boxes, *spec))
    output, argmax = torch.ops.fastmask.roi_pool(levels, boxes, *spec)
    grad = torch.randn_like(output).requires_grad_()
    arguments = (grad, boxes, argmax, [2, 4, 4, 2, 3], channels_last, *spec)
    torch.library.opcheck(torch.ops.fastmask.roi_pool_backward.default, arguments)
    torch.library.opcheck(torch.ops.fastmask.roi_pool_gather.default, (levels, boxes, argmax, *spec))


def test_compiles_as_one_graph(device):
    features, boxes = draw_features_and_boxes(1, 3, 5, 4, boxes=2, seed=11)
    features, boxes = features.to(device), boxes.to(device)
    compiled = torch.compile(roi_pool, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 3, 2, 2)
    actual = forward_backward(compiled, features, boxes, grad, 2, 0.5)
    expected = forward_backward(roi_pool, features, boxes, grad, 2, 0.5)
    assert all(map(torch.equal, actual, expected))


def test_the_default_device_makes_no_difference(device):
    features, boxes = draw_features_and_boxes(2, 3, 5, 4, boxes=2, seed=12)
    features, boxes = features.to(device), boxes.to(device)
    grad = torch.randn(2, 3, 2, 2, device=device)
    expected = forward_backward(roi_pool, features, boxes, grad, 2, 0.5)
    with torch.device("meta"):
        actual = forward_backward(roi_pool, features, boxes, grad, 2, 0.5)
    assert all(map(torch.equal, actual, expected))


def test_pixels_beyond_float32_are_exact(device):
    width = (1 << 24) + 6
    features = torch.zeros(1, 1, 1, width, device=device)
    features[..., -6:] = torch.arange(6.0, device=device)
    boxes = torch.tensor([[0.0, width - 6, 0, width - 4, 0]], device=device)  # even: float32 boxes hold no others
    assert roi_pool(features, boxes, (1, 3)).flatten().tolist() == [0, 1, 2]


class Pooler(torch.nn.Module):
    """Pools with a fixed output size."""

    def forward(self, input, boxes):
        return roi_pool(input, boxes, 2).sum()


def test_is_recorded_by_symbolic_tracing(device):
    features, boxes = draw_features_and_boxes(2, 3, 5, 4, boxes=2, seed=12)
    features, boxes = features.to(device), boxes.to(device)
    traced = torch.fx.symbolic_trace(Pooler())
    assert roi_pool in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(features, boxes), Pooler()(features, boxes))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"input: expected \[N, C, H, W\], got \[2, 3, 4\]", (torch.rand(2, 3, 4), [], 2)),
        (TypeError, r"input: expected float16, .* got torch.int64", (torch.ones(1, 1, 2, 2).long(), [], 2)),
        (
            ValueError,
            r"input: expected fewer than 2\^31",
            (torch.rand(1).expand(1, 1, 1 << 16, 1 << 15), [], 2),
        ),
        (ValueError, r"boxes: expected \[K, 5\]", (torch.rand(1, 1, 2, 2), torch.rand(3, 4), 2)),
        (ValueError, r"boxes: .*\[L, 4\]", (torch.rand(1, 1, 2, 2), [torch.rand(3, 5)], 2)),
        (ValueError, r"boxes: expected at most one", (torch.rand(1, 1, 2, 2), [torch.rand(3, 4)] * 2, 2)),
        (TypeError, r"boxes: expected a floating", (torch.rand(1, 1, 2, 2), torch.ones(3, 5).int(), 2)),
        (ValueError, r"output_size: expected", (torch.rand(1, 1, 2, 2), [], (0, 2))),
        (ValueError, r"output_size: expected", (torch.rand(1, 1, 2, 2), [], (2, 2, 2))),
        (ValueError, r"spatial_scale: expected a positive finite", (torch.rand(1, 1, 2, 2), [], 2, -1.0)),
        (TypeError, r"input: expected a Tensor, got \[\]", ([], [], 2)),
        (TypeError, r"input: expected a dense tensor", (torch.rand(1, 1, 2, 2).to_sparse(), [], 2)),
        (TypeError, r"boxes: expected a sequence of Tensors", (torch.rand(1, 1, 2, 2), None, 2)),
        (ValueError, r"boxes: expected on cpu like input", (torch.rand(1, 1, 2, 2), torch.rand(3, 5).to("meta"), 2)),
        (TypeError, r"output_size: expected an int", (torch.rand(1, 1, 2, 2), [], 2.0)),
        (ValueError, r"output_size: expected an int in", (torch.rand(1, 1, 2, 2), [], 2**31)),
        (ValueError, r"output_size: expected fewer than 2\^31", (torch.rand(1, 1, 2, 2), [], 1 << 16)),
        (TypeError, r"spatial_scale: expected a number", (torch.rand(1, 1, 2, 2), [], 2, None)),
    ],
)
def test_bad_arguments_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        roi_pool(*arguments)
