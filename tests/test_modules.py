"""The modules take torchvision's arguments and call the operators with them."""

import pytest
import torch
import torchvision
from test_roi_align import draw_boxes, draw_pyramid

import fastmask

BOXES = draw_boxes(4, 2, 60, seed=11)


@pytest.mark.parametrize("name", ["RoIAlign", "RoIPool"])
def test_single_level_modules_are_torchvisions(name, device):
    (feature,) = draw_pyramid([(9, 11)])
    arguments = (2, 0.25, 2) if name == "RoIAlign" else (2, 0.25)
    theirs = getattr(torchvision.ops, name)(*arguments)(feature, BOXES)
    module = getattr(fastmask, name)(*arguments)
    torch.testing.assert_close(module(feature.to(device), BOXES.to(device)).cpu(), theirs, rtol=2e-6, atol=2e-6)
    assert "spatial_scale=0.25" in repr(module)


def test_roi_warp_module(device):
    (feature,) = draw_pyramid([(9, 11)])
    module = fastmask.RoIWarp(2, 0.25, 2, reduction="max")
    out = module(feature.to(device), BOXES.to(device))
    assert torch.equal(out, fastmask.roi_warp(feature.to(device), BOXES.to(device), 2, 0.25, 2, reduction="max"))
    assert "reduction='max'" in repr(module)


def test_multiscale_module_is_torchvisions_and_follows_the_image_size(device):
    arguments = (["0", "1", "pool"], (2, 3), 2)
    options = {"canonical_scale": 56, "canonical_level": 3}
    theirs = torchvision.ops.MultiScaleRoIAlign(*arguments, **options)
    ours = fastmask.MultiScaleRoIAlign(*arguments, **options)
    sizes = [(32, 40), (16, 20), (8, 10), (4, 5)]
    levels = dict(zip(["0", "1", "unused", "pool"], draw_pyramid(sizes, channels=3), strict=True))
    boxes = [draw_boxes(3, 1, 120, seed=image)[:, 1:] for image in range(2)]

    def pooled(features, shapes):
        moved = {name: feature.to(device) for name, feature in features.items()}
        return ours(moved, [b.to(device) for b in boxes], shapes).cpu()

    shapes = [(128, 150), (120, 160)]
    torch.testing.assert_close(pooled(levels, shapes), theirs(levels, boxes, shapes), rtol=2e-6, atol=2e-6)
    # Images half as large: torchvision would go on with the scales of the first.
    half = [(64, 75), (60, 80)]
    fresh = torchvision.ops.MultiScaleRoIAlign(*arguments, **options)
    torch.testing.assert_close(pooled(levels, half), fresh(levels, boxes, half), rtol=2e-6, atol=2e-6)
    assert "featmap_names" in repr(ours)


def test_bad_arguments_are_named():
    pool = fastmask.MultiScaleRoIAlign(["0"], 2, 2)
    with pytest.raises(ValueError, match=r"x: expected feature maps named \['0'\], got \['1'\]"):
        pool({"1": torch.zeros(1, 1, 2, 2)}, [torch.zeros(0, 4)], [(8, 8)])
    with pytest.raises(ValueError, match="image_shapes: expected one"):
        pool({"0": torch.zeros(1, 1, 2, 2)}, [torch.zeros(0, 4)], [])
