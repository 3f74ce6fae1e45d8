"""RoIWarp: RoIPool's rounding against C's, and RoIAlign's samples against torchvision's."""

import math

import pytest
import torch
import torchvision

from fastmask import multiscale_roi_align, multiscale_roi_warp, roi_warp
from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.roi_warp import RoundingSpec
from tests.oracles.roi_align import draw_boxes, draw_pyramid
from tests.oracles.roi_pool import draw_pyramid_and_boxes, warped_boxes
from tests.oracles.roi_warp_variants import SIZES, check_pyramid


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


SCALES = [1 / 2, 1 / 4]


@pytest.mark.parametrize("ratio", [3, -1])
def test_pyramid_is_roi_align_of_boxes_rounded_on_their_level(ratio, device):
    check_pyramid(device, dtype=torch.float64, layout=torch.contiguous_format, levels=3, ratio=ratio)


def test_the_level_is_that_of_the_box_before_rounding(device):
    features = [torch.full((1, 1, 8, 8), level + 1.0, device=device) for level in range(2)]
    # 7.4 x 7.4 is below the boundary at 8 x 8; rounded on level 1 it covers 5 x 5 pixels, 10 x 10 of the image.
    boxes = torch.tensor([[0, 0.6, 0.6, 8.0, 8.0], [0, 0.0, 0.0, 8.0, 8.0]], device=device)
    assert multiscale_roi_warp(features, boxes, 1, SCALES, canonical_box_size=32).flatten().tolist() == [1, 2]


def test_boxes_without_a_level_pool_zeros_as_roi_align_does(device):
    features = [torch.full((2, 1, 64, 64), level + 1.0, device=device, requires_grad=True) for level in range(2)]
    boxes = torch.tensor([[1.0, 0, 0, side, side] for side in (4, 10, 20, 40)])
    bad = [[0, 9, 0, 3, 3], [1, -3e38, 0, 3e38, 3], [1, math.nan, 0, 3, 3]]
    boxes = torch.cat([boxes, torch.tensor(bad)]).to(device)
    scales = [1 / 2, 1 / 8]  # levels 1 and 3, without level 2
    warped = multiscale_roi_warp(features, boxes, 1, scales, canonical_box_size=32)
    aligned = multiscale_roi_align(features, boxes, 1, scales, canonical_box_size=32)
    assert warped.flatten().tolist() == aligned.flatten().tolist() == [1, 2, 0, 0, 0, 0, 0]
    first, second = torch.autograd.grad(warped.sum(), features)
    assert first[0].sum() == second[0].sum() == 0
    assert [round(grad[1].sum().item(), 5) for grad in (first, second)] == [1, 1]


def test_one_level_is_roi_warp(device):
    (feature,) = draw_pyramid([(9, 12)])
    feature, boxes = feature.to(device), draw_boxes(4, 2, 40, seed=5).to(device)
    for reduction in ("mean", "max"):
        expected = roi_warp(feature, boxes, 2, 0.37, 2, reduction=reduction)
        assert torch.equal(multiscale_roi_warp([feature], boxes, 2, [0.37], 2, reduction=reduction), expected)


@pytest.mark.reference_only
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_gradcheck_on_a_pyramid(reduction):
    _, boxes = draw_pyramid_and_boxes(SIZES[:1], boxes=4, seed=2, dtype=torch.float64)
    leaves = [level.requires_grad_() for level in draw_pyramid(SIZES[:2], torch.float64, channels=1)]

    def pool(*levels):
        return multiscale_roi_warp(levels, boxes, 2, SCALES, reduction=reduction, canonical_box_size=32)

    assert torch.autograd.gradcheck(pool, leaves)
    if reduction == "mean":
        assert torch.autograd.gradgradcheck(pool, leaves)


def test_pyramids_compile_as_one_graph(device):
    _, boxes = draw_pyramid_and_boxes(SIZES[:1], boxes=3, seed=3)
    leaves = [level.to(device).requires_grad_() for level in draw_pyramid(SIZES[:2])]
    compiled = torch.compile(multiscale_roi_warp, fullgraph=True, backend="aot_eager")
    runs = []
    for pool in (compiled, multiscale_roi_warp):
        out = pool(leaves, boxes.to(device), 2, SCALES, canonical_box_size=32)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *runs))


def test_the_rounding_operator_is_registered_in_full(device):
    boxes = draw_boxes(3, 2, 40, seed=4).to(device)
    spec = RoundingSpec(2, SCALES, canonical_box_size=32.0)
    torch.library.opcheck(torch.ops.fastmask.round_boxes.default, (boxes, *spec))


@pytest.mark.parametrize("index", [-1.0, 2.0, math.nan])
def test_batch_index_out_of_range(device, index):
    boxes = torch.tensor([[1.0, 0, 0, 3, 3], [index, 0, 0, 9, 9]], device=device)
    features = [torch.ones(2, 1, 4, 4, device=device) for _ in SCALES]
    if device == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match=r"boxes: expected image indices in \[0, 2\)"):
            multiscale_roi_warp(features, boxes, 1, SCALES, canonical_box_size=32)
    else:
        assert multiscale_roi_warp(features, boxes, 1, SCALES, canonical_box_size=32).flatten().tolist() == [1, 0]


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


LEVELS = [torch.rand(1, 1, 4, 4), torch.rand(1, 1, 2, 2)]


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "features: expected a sequence of Tensors", (LEVELS[0], [], 2, [1.0]), {}),
        (ValueError, "spatial_scales: expected one for each of 2 levels", (LEVELS, [], 2, [0.5]), {}),
        (ValueError, "spatial_scales: expected the finest level first", (LEVELS, [], 2, [0.25, 0.5]), {}),
        (ValueError, "level_rounding: expected", (LEVELS, [], 2, SCALES), {"level_rounding": "explicit"}),
        (TypeError, "sampling_ratio: expected an int", (LEVELS, [], 2, SCALES, 2.0), {}),
        (ValueError, "reduction: expected", (LEVELS, [], 2, SCALES), {"reduction": "sum"}),
    ],
)
def test_bad_arguments_of_pyramids_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        multiscale_roi_warp(*arguments, **options)
