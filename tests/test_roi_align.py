"""RoIAlign on one level and on a pyramid against torchvision, a table computed by hand and a float64 oracle."""

import math

import pytest
import torch
import torchvision

from fastmask import multiscale_roi_align, roi_align
from fastmask.kernels.roi_align import backward as roi_align_backward
from fastmask.kernels.roi_align import forward as roi_align_forward
from fastmask.kernels.roi_align import geometry as roi_align_geometry
from fastmask.kernels.roi_align import reference as roi_align_reference
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
    options = {"sizes": sizes, "images": 2, "pooled": pooled, "scales": SCALES, "ratio": ratio, "aligned": aligned}
    matrices, bounds = roi_align_matrices(boxes, level_of, **options)

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
            options = {"images": 2, "pooled": (3, 2), "ratio": ratio, "aligned": aligned}
            (matrix,), _ = roi_align_matrices(boxes, [0] * 12, sizes=[(9, 13)], scales=[0.25], **options)
            expected = torchvision.ops.roi_align(features[0], boxes, (3, 2), 0.25, ratio, aligned)
            torch.testing.assert_close(matrix @ as_rows(features[0]), as_rows(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("channels", "pooled", "ratio"),
    [(300, (1, 1), 2), (70, (2, 3), 4), (2, (14, 14), 2), (2, (14, 14), 0), (1, (1, 70), 1), (1, (70, 1), 1)],
)
def test_more_channels_and_bins_than_a_program_computes(channels, pooled, ratio, device):
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


@pytest.mark.parametrize("segments", [2, 16])
def test_the_list_of_a_crowd_is_split_in_the_same_way_each_time(segments, device, monkeypatch):
    (feature,) = draw_pyramid([(9, 8)], images=1, channels=2)
    leaf = feature.to(device).requires_grad_()
    boxes = torch.tensor([[0, 2.0, 3.0, 27.0, 21.0]], device=device).repeat(11, 1)
    out = roi_align(leaf, boxes, 2, 0.25)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(device)
    (whole,) = torch.autograd.grad(out, leaf, grad, retain_graph=True)
    monkeypatch.setattr(roi_align_backward, "SEGMENT", 3)
    monkeypatch.setattr(roi_align_backward, "MAX_SEGMENTS", segments)
    first, again = (torch.autograd.grad(out, leaf, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.reference_only
@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("ratio", [2, 0])
def test_chunks_of_samples_give_the_whole_result(ratio, reduction, monkeypatch):
    features = [feature.requires_grad_() for feature in draw_pyramid([(9, 13), (5, 7)], torch.float64)]
    boxes = draw_boxes(20, 2, 48, seed=9, dtype=torch.float64)
    runs = []
    for samples in (roi_align_geometry.MAX_SAMPLES, 50):
        monkeypatch.setattr(roi_align_geometry, "MAX_SAMPLES", samples)
        out = multiscale_roi_align(features, boxes, 3, SCALES, ratio, reduction=reduction, canonical_box_size=24)
        runs.append([out, *torch.autograd.grad(out.square().sum(), features)])
    for whole, in_chunks in zip(*runs, strict=True):
        torch.testing.assert_close(in_chunks, whole, rtol=0, atol=1e-13)


@pytest.mark.reference_only
@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_sampled_pixels_give_the_same_result(dtype, layout, reduction, monkeypatch):
    (feature,) = draw_pyramid([(40, 50)], dtype, images=3, layout=layout)
    feature.requires_grad_()
    boxes = torch.tensor([[0, 5, 6, 40, 30], [2, 90, 20, 130, 60.0], [2, 80, 25, 110, 60]])
    runs = []
    for share in (0.5, 0.0):  # the sampled pixels alone, the whole level
        monkeypatch.setattr(roi_align_reference, "MAX_SAMPLED_SHARE", share)
        out = roi_align(feature, boxes, 3, 0.25, 2, reduction=reduction)
        runs.append([out, *torch.autograd.grad(out.square().sum(), feature)])
    for few, whole in zip(*runs, strict=True):
        assert torch.equal(few, whole)
        assert few.stride() == whole.stride()


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_maximum_is_the_largest_sample(ratio, layout, device):
    # A bin is split into bins of one sample, whose mean is the sample itself.
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
def test_one_level_matches_torchvision(form, aligned, device):
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
def test_a_pyramid_matches_torchvision(levels, device):
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


def test_a_table_computed_by_hand(device):
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
    # torchvision samples the second box in a reasonable time.
    torch.testing.assert_close(
        out[1:].cpu(), torchvision.ops.roi_align(feature, far[1:], 2, 1.0, 0), rtol=0, atol=1e-13
    )
    assert out[0].abs().max() < 1e-12
    assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("box", [[0, 2, 3, 5, 3.0], [0, 2, 5, 5, 3.0]])
def test_an_empty_or_inverted_box_has_no_samples_when_aligned(box, reduction, device):
    (feature,) = draw_pyramid([(6, 7)])
    leaf = feature.to(device).requires_grad_()
    out = roi_align(leaf, torch.tensor([box], device=device), 3, 1.0, 0, True, reduction=reduction)
    assert out.eq(0).all()
    assert torch.autograd.grad(out.sum(), leaf)[0].eq(0).all()


@pytest.mark.parametrize("rounding", ["torchvision", "detectron2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_on_a_boundary_have_the_level_of_the_peer(rounding, dtype, device):
    # A box `[0, 0, area, 1]` has exactly that area. The features of a level are its number.
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
    # Levels are wide enough for the one sample, in the middle of a box that is one pixel high.
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


@pytest.mark.parametrize("ratio", [2, 0])
def test_the_bits_do_not_depend_on_how_bins_are_divided_among_programs(ratio, device, monkeypatch):
    features = [feature.to(device) for feature in draw_pyramid([(9, 13), (5, 7)], channels=3)]
    boxes = draw_boxes(4, 2, 40, seed=6).to(device)
    runs = []
    for programs in (1, 8, 1000):  # all tiles of a box, two of its four, one
        monkeypatch.setattr(roi_align_forward, "PROGRAMS", programs)
        monkeypatch.setattr(roi_align_forward, "PROGRAMS_ADAPTIVE", programs)
        runs.append(multiscale_roi_align(features, boxes, 5, SCALES, ratio, canonical_box_size=24, canonical_level=3))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_same_inputs_same_bits(reduction, device):
    features = draw_pyramid([(9, 13), (5, 7)], channels=3)
    boxes = draw_boxes(2, 2, 20, seed=4).repeat(4, 1).to(device)  # several boxes on the same pixels
    leaves = [feature.to(device).requires_grad_() for feature in features]
    runs = []
    for _ in range(2):
        out = multiscale_roi_align(leaves, boxes, 2, SCALES, reduction=reduction)
        runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradcheck(device):
    features = [
        f.to(device).requires_grad_() for f in draw_pyramid([(5, 4), (3, 2)], torch.float64, images=1, channels=1)
    ]
    boxes = torch.tensor([[0, 1.2, 2.1, 15.3, 12.2], [0, 0.2, 1.1, 60, 50]], dtype=torch.float64, device=device)

    def pool(*levels, reduction="mean"):
        return multiscale_roi_align(levels, boxes, 2, SCALES, canonical_box_size=24, reduction=reduction)

    assert torch.autograd.gradcheck(pool, features, fast_mode=True)
    assert torch.autograd.gradgradcheck(pool, features, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *levels: pool(*levels, reduction="max"), features, fast_mode=True)
    second = torch.autograd.grad(pool(*features, reduction="max").square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(sum(g.sum() for g in second), features)
