"""RoIWarp: RoIPool's rounding against C's, and RoIAlign's samples against torchvision's."""

import math

import pytest
import torch
import torchvision

from fastmask import roi_warp
from tests.oracles.roi_align import draw_boxes, draw_pyramid
from tests.oracles.roi_pool import warped_boxes


@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_is_roi_align_of_a_rounded_box(ratio, layout, device):
    (feature,) = draw_pyramid([(9, 12)], torch.float64, layout=layout)
    boxes = draw_boxes(5, 2, 40, seed=1, dtype=torch.float64)
    boxes[0, 1:] = torch.tensor([2.0, -6.0, 10.0, 22.0])  # halves, of either sign, after scaling by 1/4
    corners = warped_boxes(boxes, 1 / 4)
    assert corners[0, 1:3].tolist() == [1, -2]
    expected = torchvision.ops.roi_align(feature, corners, 2, 1.0, ratio)
    leaf = feature.to(device).requires_grad_()
    out = roi_warp(leaf, boxes.to(device), 2, 0.25, ratio)
    assert out.is_contiguous(memory_format=layout)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-13)
    assert torch.autograd.grad(out.sum(), leaf)[0].abs().sum() > 0


def test_boxes_within_half_a_pixel_of_each_other_are_the_same(device):
    (feature,) = draw_pyramid([(9, 12)])
    feature = feature.to(device)
    boxes = torch.tensor([[0, 8, 8, 24, 24.0]], device=device)
    moved = boxes + torch.tensor([0, 1.9, -1.9, 1.9, -1.9], device=device)
    for reduction in ("mean", "max"):
        assert torch.equal(
            roi_warp(feature, boxes, 3, 0.25, 2, reduction=reduction),
            roi_warp(feature, moved, 3, 0.25, 2, reduction=reduction),
        )
    assert not torch.equal(
        roi_warp(feature, boxes, 3, 0.25, 2), roi_warp(feature, boxes + boxes.sign() * 3, 3, 0.25, 2)
    )


def test_gradcheck_and_non_finite_boxes(device):
    (feature,) = draw_pyramid([(5, 6)], torch.float64, channels=1)
    leaf = feature.to(device).requires_grad_()
    boxes = draw_boxes(2, 2, 20, seed=2, dtype=torch.float64).to(device)
    for reduction in ("mean", "max"):
        assert torch.autograd.gradcheck(
            lambda x, reduction=reduction: roi_warp(x, boxes, 2, 0.25, 2, reduction=reduction), leaf, fast_mode=True
        )
    non_finite = torch.tensor([[0, math.nan, 0, 5, 5], [1, 0, 0, math.inf, 5]], device=device)
    out = roi_warp(leaf, non_finite, 2)
    assert out.eq(0).all()
    assert torch.autograd.grad(out.sum(), leaf)[0].eq(0).all()


def test_half_precision_and_one_graph(device):
    (feature,) = draw_pyramid([(9, 12)])
    boxes = draw_boxes(3, 2, 40, seed=3).to(device)
    half = feature.bfloat16().to(device)
    compiled = torch.compile(roi_warp, fullgraph=True, backend="aot_eager")
    out = compiled(half, boxes, 2, 0.25)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), roi_warp(half.float(), boxes, 2, 0.25), rtol=2**-7, atol=1e-6)
    assert torch.equal(out, roi_warp(half, boxes, 2, 0.25))


def test_the_default_device_makes_no_difference(device):
    (feature,) = draw_pyramid([(9, 12)])
    boxes = draw_boxes(3, 2, 40, seed=3).to(device)
    leaf = feature.to(device).requires_grad_()
    runs = []
    for default in (device, "meta"):
        with torch.device(default):
            out = roi_warp(leaf, boxes, 2, 0.25)
            runs.append([out, *torch.autograd.grad(out.sum(), leaf)])
    assert all(map(torch.equal, *runs))


class Pooler(torch.nn.Module):
    """Pools by RoIWarp."""

    def forward(self, input, boxes):
        return roi_warp(input, boxes, 2).sum()


def test_is_recorded_by_symbolic_tracing(device):
    (feature,) = draw_pyramid([(9, 12)])
    feature, boxes = feature.to(device), draw_boxes(3, 2, 40, seed=3).to(device)
    traced = torch.fx.symbolic_trace(Pooler())
    assert roi_warp in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(feature, boxes), Pooler()(feature, boxes))


@pytest.mark.parametrize(
    ("error", "named", "arguments"),
    [
        (ValueError, r"input: expected \[N, C, H, W\]", (torch.zeros(3, 4, 4), torch.zeros(1, 5), 2)),
        (TypeError, "input: expected float16", (torch.zeros(1, 3, 4, 4).int(), torch.zeros(1, 5), 2)),
        (ValueError, r"boxes: expected \[K, 5\]", (torch.zeros(1, 3, 4, 4), torch.zeros(1, 4), 2)),
        (ValueError, "output_size: expected at least 1", (torch.zeros(1, 3, 4, 4), torch.zeros(1, 5), 0)),
        (
            ValueError,
            "spatial_scale: expected a positive finite",
            (torch.zeros(1, 3, 4, 4), torch.zeros(1, 5), 2, math.nan),
        ),
    ],
)
def test_bad_arguments_are_named(error, named, arguments):
    with pytest.raises(error, match=named):
        roi_warp(*arguments)
