"""RoIAlign on one level and on a pyramid: against torchvision, hand tables and a float64 oracle."""

import math

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask import multiscale_roi_align, roi_align
from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.roi_align import backward as roi_align_backward
from fastmask.kernels.roi_align import geometry as roi_align_geometry
from fastmask.kernels.roi_align.levels import area_thresholds
from fastmask.kernels.roi_align.op import RoIAlignSpec
from tests.oracles.budget import assert_within_budget
from tests.oracles.roi_align import SCALES, as_rows, draw_boxes, draw_pyramid, roi_align_matrices

NAN, INF = math.nan, math.inf


CASES = [  # dtype, layout, ratio, aligned
    (torch.float32, torch.contiguous_format, 2, False),
    (torch.float32, torch.channels_last, 2, True),
    (torch.float32, torch.channels_last, 0, False),
    (torch.float32, torch.contiguous_format, -1, True),
    (torch.float32, torch.channels_last, 3, True),
    (torch.float64, torch.channels_last, 2, False),
    (torch.float64, torch.contiguous_format, 0, True),
    (torch.float16, torch.channels_last, 2, False),
    (torch.bfloat16, torch.channels_last, 2, False),
    (torch.bfloat16, torch.contiguous_format, 0, True),
]


@pytest.mark.parametrize(("dtype", "layout", "ratio", "aligned"), CASES)
def test_forward_and_backward_match_the_oracle(dtype, layout, ratio, aligned, device):
    sizes, pooled = [(9, 13), (5, 7)], (3, 2)
    features = draw_pyramid(sizes, dtype, layout=layout)
    boxes = draw_boxes(6, 2, 48, seed=ratio + 7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    level_of = [int(area >= 24**2) for area in (boxes[:, 3:] - boxes[:, 1:3]).double().prod(1)]
    assert 0 < sum(level_of) < len(boxes)
    matrices, bounds = roi_align_matrices(boxes, level_of, sizes, 2, pooled, SCALES, ratio, aligned)

    leaves = [feature.to(device).requires_grad_() for feature in features]
    out = multiscale_roi_align(
        leaves, boxes.to(device), pooled, SCALES, ratio, aligned, canonical_box_size=24, canonical_level=3
    )
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    exact = sum(matrix @ as_rows(feature) for matrix, feature in zip(matrices, features, strict=True))
    bound = sum(matrix @ as_rows(feature).abs() for matrix, feature in zip(bounds, features, strict=True))
    assert_within_budget(as_rows(out), exact, bound, dtype)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(out, leaves, grad.to(device))
    for actual, matrix, weights in zip(grads, matrices, bounds, strict=True):
        assert actual.dtype == dtype
        assert_within_budget(as_rows(actual), matrix.T @ as_rows(grad), weights.T @ as_rows(grad).abs(), dtype)


def test_the_oracle_agrees_with_torchvision():
    features = draw_pyramid([(9, 13)], torch.float64)
    boxes = draw_boxes(12, 2, 40, seed=3, dtype=torch.float64)
    for ratio in (0, 2):
        for aligned in (False, True):
            (matrix,), _ = roi_align_matrices(boxes, [0] * 12, [(9, 13)], 2, (3, 2), [0.25], ratio, aligned)
            expected = torchvision.ops.roi_align(features[0], boxes, (3, 2), 0.25, ratio, aligned)
            torch.testing.assert_close(matrix @ as_rows(features[0]), as_rows(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("channels", "pooled", "ratio"),
    [(300, (1, 1), 2), (70, (2, 3), 4), (2, (14, 14), 2), (2, (14, 14), 0), (1, (1, 70), 1), (1, (70, 1), 1)],
)
def test_more_channels_and_bins_than_a_program_takes(channels, pooled, ratio, device):
    (feature,) = draw_pyramid([(5, 6)], torch.float64, images=1, channels=channels)
    boxes = torch.tensor([[0, 1.3, -2.4, 17, 16], [0, 9, 8, 40, 11]], dtype=torch.float64)
    leaf = feature.clone().requires_grad_()
    expected = torchvision.ops.roi_align(leaf, boxes, pooled, 0.25, ratio, True)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    moved = feature.to(device).requires_grad_()
    actual = roi_align(moved, boxes.to(device), pooled, 0.25, ratio, True)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-12)
    (expected,) = torch.autograd.grad(expected, leaf, grad)
    (actual,) = torch.autograd.grad(actual, moved, grad.to(device))
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-12)


def test_long_lists_of_boxes_take_several_launches(device, monkeypatch):
    features = [feature.to(device).requires_grad_() for feature in draw_pyramid([(9, 13), (5, 7)], channels=2)]
    boxes = draw_boxes(4, 2, 40, seed=12).to(device)
    out = multiscale_roi_align(features, boxes, 2, SCALES, canonical_box_size=24, canonical_level=3)
    whole = torch.autograd.grad(out.sum(), features, retain_graph=True)
    monkeypatch.setattr(roi_align_backward, "MAX_LIST_ENTRIES", 3 * len(boxes))
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), features), whole))


@pytest.mark.reference_only
@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("ratio", [2, 0])
def test_pieces_make_the_whole(ratio, reduction, monkeypatch):
    features = [feature.requires_grad_() for feature in draw_pyramid([(9, 13), (5, 7)], torch.float64)]
    boxes = draw_boxes(20, 2, 48, seed=9, dtype=torch.float64)
    runs = []
    for samples in (roi_align_geometry.MAX_SAMPLES, 50):
        monkeypatch.setattr(roi_align_geometry, "MAX_SAMPLES", samples)
        out = multiscale_roi_align(features, boxes, 3, SCALES, ratio, reduction=reduction, canonical_box_size=24)
        runs.append([out, *torch.autograd.grad(out.square().sum(), features)])
    for whole, pieces in zip(*runs, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_maximum_is_that_of_the_samples(ratio, layout, device):
    # Of a bin split into single-sample bins, the mean of each is the sample itself.
    (feature,) = draw_pyramid([(8, 9)], torch.float64, layout=layout)
    boxes = torch.tensor([[0, 1.3, 0.7, 20.1, 21.0], [1, -9, 4, 30, 40.0], [1, 60, 60, 70, 70]], dtype=torch.float64)
    grid = ratio if ratio > 0 else 3  # ceil of every bin's size here, so that the splits coincide
    if ratio == 0:
        boxes[:, 3:] = boxes[:, 1:3] + torch.tensor([20.5, 21.5], dtype=torch.float64)
    split = roi_align(feature, boxes, 2 * grid, 0.25, 1)
    samples = split.unfold(2, grid, grid).unfold(3, grid, grid)
    leaf = feature.to(device).requires_grad_()
    out = roi_align(leaf, boxes.to(device), 2, 0.25, ratio, reduction="max")
    torch.testing.assert_close(out.cpu(), samples.amax((-1, -2)), rtol=0, atol=1e-13)
    assert out[2].eq(0).all()

    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (actual,) = torch.autograd.grad(out, leaf, grad.to(device))
    first = samples.flatten(-2).argmax(-1, keepdim=True)
    to_split = torch.zeros_like(samples).flatten(-2).scatter(-1, first, grad[..., None])
    to_split = to_split.unflatten(-1, (grid, grid)).permute(0, 1, 2, 4, 3, 5).reshape(split.shape)
    again = feature.clone().requires_grad_()
    (expected,) = torch.autograd.grad(roi_align(again, boxes, 2 * grid, 0.25, 1), again, to_split)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", ["tensor", "list"])
@pytest.mark.parametrize("aligned", [False, True])
def test_one_level_is_torchvisions(form, aligned, device):
    (feature,) = draw_pyramid([(11, 14)])
    boxes = draw_boxes(5, 2, 30, seed=5)
    boxes = boxes[boxes[:, 0].argsort()]
    if form == "list":
        boxes = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
    expected = torchvision.ops.roi_align(feature, boxes, (2, 3), 0.5, 2, aligned)
    moved = [b.to(device) for b in boxes] if form == "list" else boxes.to(device)
    actual = roi_align(feature.to(device), moved, (2, 3), 0.5, 2, aligned)
    torch.testing.assert_close(actual.cpu(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("levels", [1, 2, 4, 6])
def test_a_pyramid_is_torchvisions(levels, device):
    sizes = [(max(64 >> level, 1), max(96 >> level, 1)) for level in range(levels)]
    names, scales = [str(level) for level in range(levels)], [2.0 ** -(level + 2) for level in range(levels)]
    features = draw_pyramid(sizes, channels=3)
    boxes = torch.cat(
        [
            draw_boxes(6, 2, 250, seed=levels),
            torch.tensor([[0, 0, 0, 112, 112], [1, 5, 5, 5, 5], [1, 0, 0, 384, 256], [0, 30, 40, 10, 80.0]]),
        ]
    )
    boxes = boxes[boxes[:, 0].argsort(stable=True)]
    per_image = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
    pool = torchvision.ops.MultiScaleRoIAlign(names, 2, 2)
    expected = pool(dict(zip(names, features, strict=True)), per_image, [(256, 384)] * 2)
    actual = multiscale_roi_align([f.to(device) for f in features], boxes.to(device), 2, scales)
    torch.testing.assert_close(actual.cpu(), expected, rtol=2e-6, atol=2e-6)


def test_a_hand_table(device):
    # Bins of half a pixel, one sample each, on a ramp 5y + x: the value is 6 * 1.25 at (1.25, 1.25), and so on.
    ramp = torch.arange(25.0, device=device).view(1, 1, 5, 5)
    box = torch.tensor([[0, 1, 1, 3, 3.0]], device=device)
    step = torch.arange(4) / 2
    for aligned, start in ((False, 1.25), (True, 0.75)):
        table = 5 * (start + step[:, None]) + start + step
        assert torch.equal(roi_align(ramp, box, 4, 1.0, 0, aligned).cpu()[0, 0], table)


def test_non_finite_boxes_have_no_features_and_no_gradient(device):
    (feature,) = draw_pyramid([(6, 7)])
    leaf = feature.to(device).requires_grad_()
    non_finite = [
        [0, NAN, 0, 5, 5],
        [0, 0, 0, INF, 5],
        [0, -INF, 0, 5, 5],
        [1, 0, 0, 5, NAN],
        [0, -3e38, 0, 3e38, 9],
    ]
    for reduction in ("mean", "max"):
        for ratio, scale in ((0, 1.0), (2, 1.0), (2, 4.0)):
            boxes = torch.tensor([*non_finite, [0, *[1e38 * scale] * 4]], device=device)  # infinite when scaled by 4
            out = roi_align(leaf, boxes, 2, scale, ratio, True, reduction=reduction)
            assert out.eq(0).all()
            assert torch.autograd.grad(out.sum(), leaf)[0].eq(0).all()


def test_a_box_of_a_billion_pixels_takes_no_longer_than_the_image(device):
    (feature,) = draw_pyramid([(6, 7)], torch.float64)
    far = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [1, -100, -100, 100, 100]], dtype=torch.float64)
    leaf = feature.to(device).requires_grad_()
    out = roi_align(leaf, far.to(device), 2, 1.0, 0)
    # The second is small enough to be sampled whole, by torchvision.
    torch.testing.assert_close(
        out[1:].cpu(), torchvision.ops.roi_align(feature, far[1:], 2, 1.0, 0), rtol=0, atol=1e-13
    )
    assert out[0].abs().max() < 1e-12
    assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()


def test_an_empty_box_has_no_samples_when_aligned(device):
    (feature,) = draw_pyramid([(6, 7)])
    leaf = feature.to(device).requires_grad_()
    out = roi_align(leaf, torch.tensor([[0, 2, 3, 5, 3.0]], device=device), 3, 1.0, 0, True)
    assert out.eq(0).all()
    assert torch.autograd.grad(out.sum(), leaf)[0].eq(0).all()


@pytest.mark.parametrize("rounding", ["torchvision", "detectron2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_on_a_boundary_have_the_level_of_the_peer(rounding, dtype, device):
    # A box `[0, 0, area, 1]` has that area to the bit; each level is filled with its number.
    areas = torch.tensor([112.0, 224, 448], dtype=dtype).square()
    bits = areas.view(torch.int32 if dtype == torch.float32 else torch.int64)
    steps = torch.tensor([-90, -41, -40, -22, -3, -2, -1, 0, 1, 7], dtype=bits.dtype)
    if dtype == torch.float64:
        steps *= 2**20
    areas = torch.cat([(bits[:, None] + steps).flatten().view(dtype), areas * (1 - 1.2e-6), areas * (1 - 1.5e-6)])
    boxes = torch.zeros(len(areas), 5, dtype=dtype)
    boxes[:, 3], boxes[:, 4] = areas, 1
    if rounding == "torchvision":
        expected = torchvision.ops.poolers.LevelMapper(2, 5)([boxes[:, 1:]]) + 2
    else:
        expected = (4 + torch.log2(areas.sqrt() / 224 + 1e-8)).floor().clamp(2, 5).long()
    assert len(expected.unique()) == 4
    # Wide enough for the one sample, in the middle of a box that is one pixel high.
    levels = [torch.full((1, 1, 2, 7000), float(level), dtype=dtype, device=device) for level in (2, 3, 4, 5)]
    scales = [2.0**-level for level in (2, 3, 4, 5)]
    out = multiscale_roi_align(levels, boxes.to(device), 1, scales, 1, level_rounding=rounding)
    assert torch.equal(out.flatten().round().long().cpu(), expected)


def test_a_level_missing_from_the_pyramid_gives_zeros_like_torchvision(device):
    names, sizes = ["a", "b"], [(64, 64), (16, 16)]
    features = draw_pyramid(sizes, images=1)
    boxes = torch.tensor([[0, 0, 0, 50, 50], [0, 0, 0, 300, 300], [0, 0, 0, 500, 500.0]])
    pool = torchvision.ops.MultiScaleRoIAlign(names, 2, 2)
    expected = pool(dict(zip(names, features, strict=True)), [boxes[:, 1:]], [(512, 512)])
    actual = multiscale_roi_align([f.to(device) for f in features], boxes.to(device), 2, [1 / 8, 1 / 32])
    torch.testing.assert_close(actual.cpu(), expected, rtol=2e-6, atol=2e-6)
    assert expected[2].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_nothing_to_pool(reduction, device):
    (feature,) = draw_pyramid([(6, 7)])
    leaf = feature.to(device).requires_grad_()
    for boxes in (torch.zeros(0, 5, device=device), [torch.zeros(0, 4, device=device)] * 2, []):
        out = roi_align(leaf, boxes, 2, reduction=reduction)
        assert out.shape == (0, 5, 2, 2)
        assert torch.autograd.grad(out.sum(), leaf)[0].eq(0).all()
    for shape in ((0, 5, 6, 7), (2, 0, 6, 7)):
        boxes = torch.zeros(0 if not shape[0] else 1, 5, device=device)
        leaf = torch.zeros(shape, device=device, requires_grad=True)
        out = roi_align(leaf, boxes, 2, reduction=reduction)
        assert out.shape == (len(boxes), shape[1], 2, 2)
        assert torch.autograd.grad(out.sum(), leaf)[0].shape == shape
    no_pixels = [torch.zeros(1, 2, 8, 8, device=device), torch.zeros(1, 2, 0, 4, device=device)]
    boxes = torch.tensor([[0, 0, 0, 900, 900.0]], device=device)
    assert multiscale_roi_align(no_pixels, boxes, 2, [1 / 4, 1 / 8]).eq(0).all()


def test_non_contiguous_inputs(device):
    (feature,) = draw_pyramid([(12, 14)], images=4, channels=6)
    boxes = draw_boxes(4, 2, 10, seed=1)
    expected = roi_align(feature[::2, 1::2, 2:10, ::2].contiguous().to(device), boxes.to(device), 2)
    moved, wide = feature.to(device), torch.zeros(4, 10, device=device)
    wide[:, ::2] = boxes.to(device)
    assert torch.equal(roi_align(moved[::2, 1::2, 2:10, ::2], wide[:, ::2], 2), expected)


def test_a_gradient_of_stride_zero(device):
    (feature,) = draw_pyramid([(6, 7)])
    leaf = feature.to(device).requires_grad_()
    out = roi_align(leaf, draw_boxes(3, 2, 8, seed=2).to(device), 2)
    (expanded,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    assert torch.equal(expanded, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_same_inputs_same_bits(reduction, device):
    features = draw_pyramid([(9, 13), (5, 7)], channels=3)
    boxes = draw_boxes(2, 2, 20, seed=4).repeat(4, 1).to(device)  # many on the same pixels
    leaves = [feature.to(device).requires_grad_() for feature in features]
    runs = []
    for _ in range(2):
        out = multiscale_roi_align(leaves, boxes, 2, SCALES, reduction=reduction)
        runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradcheck(device):
    features = [f.to(device).requires_grad_() for f in draw_pyramid([(5, 4), (3, 2)], torch.float64, 1, 1)]
    boxes = torch.tensor([[0, 1.2, 2.1, 15.3, 12.2], [0, 0.2, 1.1, 60, 50]], dtype=torch.float64, device=device)

    def pool(*levels, reduction="mean"):
        return multiscale_roi_align(levels, boxes, 2, SCALES, canonical_box_size=24, reduction=reduction)

    assert torch.autograd.gradcheck(pool, features, fast_mode=True)
    assert torch.autograd.gradgradcheck(pool, features, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *levels: pool(*levels, reduction="max"), features, fast_mode=True)
    second = torch.autograd.grad(pool(*features, reduction="max").square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(sum(g.sum() for g in second), features)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_are_registered_operators(reduction, layout, device):
    spec = RoIAlignSpec(2, 3, SCALES, sampling_ratio=2, aligned=False, reduction=reduction)
    features = [f.to(device) for f in draw_pyramid([(6, 7), (3, 4)], layout=layout)]
    boxes = draw_boxes(3, 2, 24, seed=6).to(device)
    leaves = [feature.requires_grad_() for feature in features]
    torch.library.opcheck(torch.ops.fastmask.roi_align.default, (leaves, boxes, *spec))
    out, argmax = torch.ops.fastmask.roi_align(features, boxes, *spec)
    grad = torch.ones_like(out).requires_grad_(reduction == "mean")
    last = layout == torch.channels_last
    arguments = (grad, boxes, argmax, [2, 6, 7, 3, 4], last, *spec)
    torch.library.opcheck(torch.ops.fastmask.roi_align_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(dynamic, device):
    def pool(features, boxes):
        return multiscale_roi_align(features, [boxes, boxes + 1], (2, 2), SCALES).square().sum()

    compiled = torch.compile(pool, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes, k in (([(6, 7), (3, 4)], 2), ([(8, 7), (4, 4)], 3)):
        features = [f.to(device).requires_grad_() for f in draw_pyramid(sizes)]
        boxes = draw_boxes(k, 2, 24, seed=k)[:, 1:].to(device)
        expected, actual = pool(features, boxes), compiled(features, boxes)
        assert torch.equal(actual, expected)
        for a, b in zip(torch.autograd.grad(actual, features), torch.autograd.grad(expected, features), strict=True):
            assert torch.equal(a, b)


def test_runs_on_fake_tensors():
    with FakeTensorMode():
        features = [torch.empty(2, 5, 6, 7, dtype=torch.bfloat16, requires_grad=True) for _ in "ab"]
        out = multiscale_roi_align(features, torch.empty(9, 5), 7, [1 / 4, 1 / 8])
        assert (out.shape, out.dtype) == ((9, 5, 7, 7), torch.bfloat16)
        assert [g.shape for g in torch.autograd.grad(out.sum(), features)] == [(2, 5, 6, 7)] * 2


def test_autocast_keeps_half_precision_and_the_boxes_in_float32(device):
    features = [f.to(device) for f in draw_pyramid([(6, 7), (3, 4)])]
    boxes = draw_boxes(3, 2, 24, seed=8).to(device)
    with torch.autocast(device, torch.bfloat16):
        half = multiscale_roi_align([f.bfloat16() for f in features], boxes, 2, SCALES)
        mixed = multiscale_roi_align([features[0], features[1].bfloat16()], boxes, 2, SCALES)
    assert half.dtype == torch.bfloat16
    assert mixed.dtype == torch.float32
    exact = multiscale_roi_align([f.bfloat16().float() for f in features], boxes, 2, SCALES)
    torch.testing.assert_close(half.float(), exact, rtol=2**-7, atol=0)  # rounded once
    # An index that bfloat16 cannot hold: 257 would become 256.
    many = torch.arange(258.0, device=device).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    lists = [torch.empty(0, 4, device=device, dtype=torch.bfloat16)] * 257
    lists.append(torch.tensor([[0, 0, 1, 1]], device=device, dtype=torch.bfloat16))
    assert roi_align(many, lists, 1).item() == 257


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("rounding", ["torchvision", "detectron2"])
def test_the_default_device_makes_no_difference(rounding, reduction, device):
    features = [f.to(device).requires_grad_() for f in draw_pyramid([(6, 7), (3, 4)])]
    boxes = draw_boxes(3, 2, 24, seed=8, dtype=torch.float64).to(device)
    area_thresholds.cache_clear()
    runs = []
    for default in (device, "meta"):
        with torch.device(default):
            pooled = [
                multiscale_roi_align(
                    features,
                    boxes,
                    2,
                    SCALES,
                    ratio,
                    canonical_box_size=24,
                    reduction=reduction,
                    level_rounding=rounding,
                )
                for ratio in (0, 2)
            ]
            pooled.append(roi_align(features[0], [boxes[:, 1:]], 2, reduction=reduction))
            runs.append([*pooled, *torch.autograd.grad(sum(out.sum() for out in pooled), features)])
        area_thresholds.cache_clear()
    assert all(map(torch.equal, *runs))


class Pooler(torch.nn.Module):
    """Pools from two levels and from the first alone."""

    def forward(self, fine, coarse, boxes):
        pooled = multiscale_roi_align([fine, coarse], boxes, 2, SCALES, canonical_box_size=24)
        return pooled + roi_align(fine, boxes, output_size=2, spatial_scale=0.25)


def test_is_recorded_by_symbolic_tracing(device):
    features = [f.to(device) for f in draw_pyramid([(6, 7), (3, 4)])]
    boxes = draw_boxes(3, 2, 24, seed=8).to(device)
    traced = torch.fx.symbolic_trace(Pooler())
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called[:2] == [multiscale_roi_align, roi_align]
    assert torch.equal(traced(*features, boxes), Pooler()(*features, boxes))


F, B = torch.zeros(2, 3, 4, 4), torch.zeros(1, 5)


@pytest.mark.parametrize(
    ("error", "named", "call"),
    [
        (ValueError, "features: expected at least one level", lambda: multiscale_roi_align([], B, 2, [])),
        (TypeError, "input: expected float16", lambda: roi_align(F.int(), B, 2)),
        (ValueError, r"input: expected \[N, C, H, W\]", lambda: roi_align(F[0], B, 2)),
        (ValueError, "same N and C", lambda: multiscale_roi_align([F, F[:1]], B, 2, SCALES)),
        (
            ValueError,
            "features: expected all levels on cpu",
            lambda: multiscale_roi_align([F, F.to("meta")], B, 2, SCALES),
        ),
        (ValueError, r"boxes: expected \[K, 5\]", lambda: roi_align(F, B[:, :4], 2)),
        (ValueError, r"boxes: expected a list of \[L, 4\]", lambda: roi_align(F, [B], 2)),
        (
            ValueError,
            "boxes: expected at most one tensor per image, 2",
            lambda: roi_align(F, [B[:, :4]] * 3, 2),
        ),
        (TypeError, "boxes: expected a floating", lambda: roi_align(F, B.int(), 2)),
        (ValueError, "boxes: expected on cpu", lambda: roi_align(F, B.to("meta"), 2)),
        (ValueError, "output_size: expected at least 1", lambda: roi_align(F, B, (2, 0))),
        (ValueError, "spatial_scale: expected a positive finite", lambda: roi_align(F, B, 2, -0.5)),
        (ValueError, "spatial_scales: expected one for each of 2", lambda: multiscale_roi_align([F, F], B, 2, [0.25])),
        (ValueError, "finest level first", lambda: multiscale_roi_align([F, F], B, 2, SCALES[::-1])),
        (
            ValueError,
            "consecutive powers of 2",
            lambda: multiscale_roi_align([F, F], B, 2, [1 / 4, 1 / 16], level_rounding="detectron2"),
        ),
        (ValueError, 'reduction: expected "mean" or "max"', lambda: roi_align(F, B, 2, reduction="sum")),
        (
            ValueError,
            'level_rounding: expected "torchvision" or "detectron2"',
            lambda: multiscale_roi_align([F], B, 2, [1], level_rounding="mmdet"),
        ),
        (
            ValueError,
            "canonical_box_size: expected a positive",
            lambda: multiscale_roi_align([F], B, 2, [1], canonical_box_size=0),
        ),
        (TypeError, "features: expected a sequence of Tensors", lambda: multiscale_roi_align(F, B, 2, [1])),
        (TypeError, "input: expected a Tensor, got None", lambda: roi_align(None, B, 2)),
        (TypeError, "input: expected a Tensor, got .*ndarray", lambda: roi_align(F.numpy(), B, 2)),
        (TypeError, "input: expected a dense tensor, got torch.sparse_coo", lambda: roi_align(F.to_sparse(), B, 2)),
        (TypeError, "boxes: expected a sequence of Tensors", lambda: roi_align(F, B.numpy(), 2)),
        (TypeError, "boxes: expected a Tensor", lambda: roi_align(F, [[0, 0, 1, 1]], 2)),
        (TypeError, "boxes: expected a dense tensor", lambda: roi_align(F, B.to_sparse(), 2)),
        (TypeError, "boxes: expected a floating dtype", lambda: roi_align(F, B.to(torch.complex64), 2)),
        (TypeError, "output_size: expected an int, got 2.0", lambda: roi_align(F, B, 2.0)),
        (TypeError, "output_size: expected two ints", lambda: roi_align(F, B, "22")),
        (ValueError, "output_size: expected two ints", lambda: roi_align(F, B, (2, 2, 2))),
        (ValueError, r"output_size: expected fewer than 2\^31", lambda: roi_align(F, B, (1 << 15, 1 << 15))),
        (TypeError, "spatial_scale: expected a number", lambda: roi_align(F, B, 2, "1")),
        (ValueError, "spatial_scale: expected a number in the range", lambda: roi_align(F, B, 2, 10**400)),
        (TypeError, "spatial_scales: expected a number", lambda: multiscale_roi_align([F], B, 2, [None])),
        (TypeError, "sampling_ratio: expected an int, got 2.5", lambda: roi_align(F, B, 2, 1.0, 2.5)),
        (ValueError, r"sampling_ratio: expected fewer than 2\^31", lambda: roi_align(F, B, 2, 1.0, 1 << 16)),
        (TypeError, "aligned: expected a bool", lambda: roi_align(F, B, 2, 1.0, 2, "yes")),
        (
            TypeError,
            "canonical_level: expected an int",
            lambda: multiscale_roi_align([F], B, 2, [1], canonical_level=4.0),
        ),
    ],
)
def test_bad_arguments_are_named(error, named, call):
    with pytest.raises(error, match=named):
        call()


@pytest.mark.reference_only
@pytest.mark.parametrize("index", [-1, 2, NAN])
def test_image_indices_outside_the_batch_raise(index):
    boxes = torch.tensor([[0, 0, 0, 2, 2], [index, 0, 0, 2, 2.0]])
    with pytest.raises(ValueError, match=r"boxes: expected image indices in \[0, 2\).* in row 1"):
        roi_align(F, boxes, 2)


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="the reference raises instead")
def test_kernels_pool_zeros_for_image_indices_outside_the_batch():
    device = "cpu" if INTERPRETED else "cuda"
    boxes = torch.tensor([[-1, 0, 0, 2, 2], [2, 0, 0, 2, 2], [NAN, 0, 0, 2, 2], [1, 0, 0, 2, 2.0]], device=device)
    out = roi_align(torch.ones(2, 3, 4, 4, device=device), boxes, 2)
    assert out.amax((1, 2, 3)).tolist() == [0, 0, 0, 1]
