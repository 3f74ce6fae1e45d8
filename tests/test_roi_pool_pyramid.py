"""multiscale_roi_pool against torchvision level by level, bit for bit; levels of boxes, gradients, compilation."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastmask import multiscale_roi_align, multiscale_roi_pool
from fastmask.kernels.roi_align.levels import LevelRule, area_thresholds
from fastmask.kernels.roi_pool import reference, roi_pool
from tests.oracles.roi_pool import assert_pyramid_like_torchvision, draw_features_and_boxes, draw_pyramid_and_boxes

NAN, INF = float("nan"), float("inf")


def constant_levels(count, device="cpu", side=8):
    """Level l holds l + 1 everywhere, so that a pooled value names the level of a box."""
    return [torch.full((1, 1, side, side), level + 1.0, device=device) for level in range(count)]


@pytest.mark.parametrize("levels", [2, 6])
def test_pyramid_matches_torchvision_bit_for_bit(device, levels):
    sizes = [(20, 17), (10, 9), (5, 5), (3, 2), (2, 1), (1, 1)][:levels]
    features, boxes = draw_pyramid_and_boxes(sizes, boxes=9, channels=3, seed=levels)
    boxes[:2, 1:] = torch.tensor([[0.0, 0, 30, 30], [-4.0, 2, 50, 60]])
    scales = [2.0 ** -(level + 1) for level in range(levels)]
    assert_pyramid_like_torchvision(device, features, boxes, (2, 3), scales, canonical_box_size=32)


@pytest.mark.reference_only
def test_many_boxes_of_a_pyramid_in_chunks_match_torchvision(monkeypatch):
    features, boxes = draw_pyramid_and_boxes([(40, 50), (20, 25), (10, 13)], boxes=200, seed=3)
    monkeypatch.setattr(reference, "MAX_FEATURES", 1000)
    monkeypatch.setattr(reference, "MAX_GRADIENTS", 1000)
    assert_pyramid_like_torchvision("cpu", features, boxes, (3, 3), [1 / 2, 1 / 4, 1 / 8], canonical_box_size=100)


@pytest.mark.parametrize("rounding", ["torchvision", "detectron2"])
def test_boundaries_between_levels_are_exact(device, rounding):
    bits = torch.tensor(area_thresholds(2, 4, LevelRule(224.0, 4, rounding), torch.float32))
    reached = bits.view(torch.float64).float()
    below = reached.nextafter(torch.tensor(0.0))
    boxes = torch.zeros(4, 5, device=device)
    boxes[:, 4] = 1  # as wide as its area, before rounding and after scaling by any level's scale
    boxes[:, 3] = torch.stack([below, reached], 1).flatten().to(device)
    pooled = multiscale_roi_pool(constant_levels(3, device), boxes, 1, [1 / 4, 1 / 8, 1 / 16], level_rounding=rounding)
    assert pooled.flatten().tolist() == [1, 2, 2, 3]


def test_the_level_is_that_of_the_box_before_rounding(device):
    # 7.4 x 7.4 is below the boundary at 8 x 8; rounded on level 1 it covers 5 x 5 pixels, 10 x 10 of the image.
    boxes = torch.tensor([[0, 0.6, 0.6, 8.0, 8.0], [0, 0.0, 0.0, 8.0, 8.0]], device=device)
    pooled = multiscale_roi_pool(constant_levels(2, device), boxes, 1, [1 / 2, 1 / 4], canonical_box_size=32)
    assert pooled.flatten().tolist() == [1, 2]


def test_boxes_without_a_level_pool_zeros_as_roi_align_does(device):
    side = torch.tensor([4.0, 10, 20, 40, 80])
    boxes = torch.zeros(8, 5)
    boxes[:5, 3:] = side[:, None]
    boxes[5, 1:] = torch.tensor([9.0, 0, 3, 3])  # a negative area
    boxes[6, 1:] = torch.tensor([-3e38, 0, 3e38, 3])  # its side overflows
    boxes[7, 1:] = torch.tensor([0.0, NAN, 3, 3])
    features, boxes = constant_levels(2, device, side=64), boxes.to(device)
    scales = [1 / 2, 1 / 8]  # levels 1 and 3, without level 2
    pooled = multiscale_roi_pool(features, boxes, 1, scales, canonical_box_size=32)
    aligned = multiscale_roi_align(features, boxes, 1, scales, canonical_box_size=32)
    assert pooled.flatten().tolist() == aligned.flatten().tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    everything = multiscale_roi_pool(features[:1], boxes[6:7], 1, scales[:1])
    assert everything.flatten().tolist() == [1]  # a single level takes every box


def test_one_level_is_roi_pool(device):
    features, boxes = draw_features_and_boxes(2, 3, 6, 7, boxes=4, seed=13)
    features, boxes = features.to(device), boxes.to(device)
    assert torch.equal(multiscale_roi_pool([features], boxes, 2, [0.37]), roi_pool(features, boxes, 2, 0.37))


def test_levels_of_several_dtypes_and_an_empty_level(device):
    features, boxes = draw_pyramid_and_boxes([(6, 7), (3, 4)], images=1, channels=2, boxes=2, seed=5)
    boxes[:, 1:] = torch.tensor([[0.0, 0, 5, 6], [0, 0, 14, 13]])
    mixed = [features[0].half().to(device), features[1].to(device).requires_grad_()]
    pooled = multiscale_roi_pool(mixed, boxes.to(device), 2, [1 / 2, 1 / 4], canonical_box_size=32)
    wide = [features[0].half().float().to(device), features[1].to(device)]
    assert torch.equal(pooled, multiscale_roi_pool(wide, boxes.to(device), 2, [1 / 2, 1 / 4], canonical_box_size=32))
    assert pooled.dtype == torch.float32
    empty = [features[0].to(device).requires_grad_(), torch.zeros(1, 2, 0, 4, device=device, requires_grad=True)]
    pooled = multiscale_roi_pool(empty, boxes.to(device), 2, [1 / 2, 1 / 4], canonical_box_size=32)
    first, second = torch.autograd.grad(pooled.sum(), empty)
    assert not pooled[1].any()
    assert first.sum() == 8
    assert second.shape == (1, 2, 0, 4)


@pytest.mark.reference_only
def test_gradients_of_both_orders_on_a_pyramid():
    features, boxes = draw_pyramid_and_boxes([(4, 3), (2, 2)], channels=1, boxes=3, seed=8, dtype=torch.float64)
    boxes[:, 1:] = torch.tensor([[0.0, 0, 4, 5], [1, 0, 9, 8], [0, 1, 14, 9]]) + 0.01
    features = [feature.requires_grad_() for feature in features]

    def pool(*levels):
        return multiscale_roi_pool(levels, boxes, 2, [1 / 2, 1 / 4], canonical_box_size=32)

    assert gradcheck(pool, features)
    assert gradgradcheck(pool, features)


def test_pyramids_compile_as_one_graph(device):
    features, boxes = draw_pyramid_and_boxes([(5, 4), (3, 2)], channels=2, boxes=3, seed=11)
    leaves = [feature.to(device).requires_grad_() for feature in features]
    compiled = torch.compile(multiscale_roi_pool, fullgraph=True, backend="aot_eager")
    runs = []
    for pool in (compiled, multiscale_roi_pool):
        output = pool(leaves, boxes.to(device), 2, [1 / 2, 1 / 4], canonical_box_size=32)
        runs.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all(map(torch.equal, *runs))


LEVELS = [torch.rand(1, 1, 4, 4), torch.rand(1, 1, 2, 2)]


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "features: expected a sequence of Tensors", (LEVELS[0], [], 2, [1.0]), {}),
        (ValueError, "features: expected at least one level", ([], [], 2, []), {}),
        (
            ValueError,
            r"features: expected fewer than 2\^31",
            ([torch.rand(1).expand(1, 1, 1 << 16, 1 << 15)], [], 2, [1]),
            {},
        ),
        (ValueError, "spatial_scales: expected one for each of 2 levels", (LEVELS, [], 2, [0.5]), {}),
        (ValueError, "spatial_scales: expected the finest level first", (LEVELS, [], 2, [0.25, 0.5]), {}),
        (
            ValueError,
            "spatial_scales: .*consecutive",
            (LEVELS, [], 2, [1 / 2, 1 / 8]),
            {"level_rounding": "detectron2"},
        ),
        (ValueError, "level_rounding: expected", (LEVELS, [], 2, [1 / 2, 1 / 4]), {"level_rounding": "explicit"}),
        (
            ValueError,
            "canonical_box_size: expected a positive",
            (LEVELS, [], 2, [1 / 2, 1 / 4]),
            {"canonical_box_size": 0},
        ),
        (TypeError, "canonical_level: expected an int", (LEVELS, [], 2, [1 / 2, 1 / 4]), {"canonical_level": 4.0}),
    ],
)
def test_bad_arguments_of_pyramids_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        multiscale_roi_pool(*arguments, **options)
