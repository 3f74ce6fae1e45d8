"""The modules take torchvision's arguments and call the operators."""

import pytest
import torch
import torchvision

import fastmask
from tests.oracles.roi_align import draw_boxes, draw_pyramid

BOXES = draw_boxes(4, 2, 60, seed=11)


@pytest.mark.parametrize("name", ["RoIAlign", "RoIPool"])
def test_single_level_modules_match_torchvision(name, device):
    (feature,) = draw_pyramid([(9, 11)])
    arguments = (2, 0.25, 2) if name == "RoIAlign" else (2, 0.25)
    expected = getattr(torchvision.ops, name)(*arguments)(feature, BOXES)
    module = getattr(fastmask, name)(*arguments)
    torch.testing.assert_close(module(feature.to(device), BOXES.to(device)).cpu(), expected, rtol=2e-6, atol=2e-6)
    assert "spatial_scale=0.25" in repr(module)


def test_roi_warp_module(device):
    (feature,) = draw_pyramid([(9, 11)])
    module = fastmask.RoIWarp(2, 0.25, 2, reduction="max")
    out = module(feature.to(device), BOXES.to(device))
    assert torch.equal(out, fastmask.roi_warp(feature.to(device), BOXES.to(device), 2, 0.25, 2, reduction="max"))
    assert "reduction='max'" in repr(module)


def test_multiscale_module_matches_torchvision_and_follows_the_image_size(device):
    arguments = (["0", "1", "pool"], (2, 3), 2)
    options = {"canonical_scale": 56, "canonical_level": 3}
    peer = torchvision.ops.MultiScaleRoIAlign(*arguments, **options)
    pool = fastmask.MultiScaleRoIAlign(*arguments, **options)
    sizes = [(32, 40), (16, 20), (8, 10), (4, 5)]
    levels = dict(zip(["0", "1", "unused", "pool"], draw_pyramid(sizes, channels=3), strict=True))
    boxes = [draw_boxes(3, 1, 120, seed=image)[:, 1:] for image in range(2)]

    def pooled(features, shapes):
        moved = {name: feature.to(device) for name, feature in features.items()}
        return pool(moved, [b.to(device) for b in boxes], shapes).cpu()

    shapes = [(128, 150), (120, 160)]
    torch.testing.assert_close(pooled(levels, shapes), peer(levels, boxes, shapes), rtol=2e-6, atol=2e-6)
    # For images half as large, torchvision's pooler would keep the scales of its first call.
    half = [(64, 75), (60, 80)]
    fresh = torchvision.ops.MultiScaleRoIAlign(*arguments, **options)
    torch.testing.assert_close(pooled(levels, half), fresh(levels, boxes, half), rtol=2e-6, atol=2e-6)
    assert "featmap_names" in repr(pool)


@pytest.mark.parametrize("name", ["RoIAlign", "RoIPool", "RoIWarp"])
def test_symbolic_tracing_goes_through_the_modules(name, device):
    (feature,) = draw_pyramid([(9, 11)])
    module = getattr(fastmask, name)(2, 0.25, *[2] * (name != "RoIPool"))
    traced = torch.fx.symbolic_trace(module)
    assert torch.equal(traced(feature.to(device), BOXES.to(device)), module(feature.to(device), BOXES.to(device)))


def test_symbolic_tracing_goes_through_the_multiscale_module(device):
    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = fastmask.MultiScaleRoIAlign(["fine", "coarse"], 2, 2)
            self.halve = torch.nn.MaxPool2d(2)

        def forward(self, feature, boxes, image_shapes):
            return self.pool({"fine": feature, "coarse": self.halve(feature)}, boxes, image_shapes)

    (feature,) = draw_pyramid([(8, 12)])
    features = feature.to(device)
    boxes = [draw_boxes(3, 1, 120, seed=image)[:, 1:].to(device) for image in range(len(feature))]
    arguments = (features, boxes, [(32, 48)] * len(feature))
    detector = Detector()
    assert torch.equal(torch.fx.symbolic_trace(detector)(*arguments), detector(*arguments))
    levels = {"fine": features, "coarse": detector.halve(features)}
    traced = torch.fx.symbolic_trace(detector.pool)
    assert torch.equal(traced(levels, *arguments[1:]), detector.pool(levels, *arguments[1:]))


@pytest.mark.parametrize(
    ("error", "message", "construct"),
    [
        (TypeError, "output_size: expected an int", lambda: fastmask.RoIAlign(2.0, 1.0, 2)),
        (ValueError, "spatial_scale: expected a positive", lambda: fastmask.RoIPool(2, 0)),
        (TypeError, "sampling_ratio: expected an int", lambda: fastmask.RoIWarp(2, 1.0, None)),
        (TypeError, "featmap_names: expected a sequence", lambda: fastmask.MultiScaleRoIAlign("0", 2, 2)),
        (
            ValueError,
            "canonical_scale: expected a positive",
            lambda: fastmask.MultiScaleRoIAlign(["0"], 2, 2, canonical_scale=0),
        ),
    ],
)
def test_bad_constructor_arguments_are_named(error, message, construct):
    with pytest.raises(error, match=message):
        construct()


def test_bad_arguments_are_named():
    pool = fastmask.MultiScaleRoIAlign(["0"], 2, 2)
    with pytest.raises(ValueError, match=r"x: expected feature maps named \['0'\], got \['1'\]"):
        pool({"1": torch.zeros(1, 1, 2, 2)}, [torch.zeros(0, 4)], [(8, 8)])
    with pytest.raises(ValueError, match="image_shapes: expected one"):
        pool({"0": torch.zeros(1, 1, 2, 2)}, [torch.zeros(0, 4)], [])
    with pytest.raises(TypeError, match="x: expected a mapping"):
        pool([torch.zeros(1, 1, 2, 2)], [torch.zeros(0, 4)], [(8, 8)])
    with pytest.raises(TypeError, match="x: expected a Tensor, got None"):
        pool({"0": None}, [torch.zeros(0, 4)], [(8, 8)])
    with pytest.raises(TypeError, match="image_shapes: expected two ints"):
        pool({"0": torch.zeros(1, 1, 2, 2)}, [torch.zeros(0, 4)], [8])
