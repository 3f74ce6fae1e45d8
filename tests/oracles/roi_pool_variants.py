"""Small calls of every variant of RoIPool's kernels: output and gradients are torchvision's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from fastmask.kernels.roi_pool import backward, regions
from tests.oracles.roi_pool import (
    assert_like_torchvision,
    assert_pyramid_like_torchvision,
    draw_features_and_boxes,
    draw_pyramid_and_boxes,
)


def _check_map(device, *, dtype=torch.float32, layout=torch.channels_last, channels=5, size=(2, 3), scale=1.0):
    """One feature map."""
    features, boxes = draw_features_and_boxes(2, channels, 7, 6, boxes=4, seed=channels, dtype=dtype)
    boxes[:, 1:] /= scale
    assert_like_torchvision(device, features.to(memory_format=layout), boxes, size, scale)


def _check_pyramid(device, *, dtype=torch.float32, layout=torch.channels_last, channels=5, levels=2, boxes=6):
    """Levels of scales 1/2, 1/4, ...; boxes of 5 and 10 pixels begin the second and third level."""
    sizes = [(9, 7), (5, 4), (3, 2)][:levels]
    scales = [2.0 ** -(level + 1) for level in range(levels)]
    features, rois = draw_pyramid_and_boxes(sizes, channels=channels, boxes=boxes, seed=levels, dtype=dtype)
    features = [feature.to(memory_format=layout) for feature in features]
    assert_pyramid_like_torchvision(device, features, rois, (2, 2), scales, canonical_box_size=20)


def _check_ties(device):
    """Equal features, of which the first wins, and gradients whose sum depends on their order."""
    features, boxes = draw_features_and_boxes(1, 3, 5, 6, boxes=8, seed=1)
    assert_like_torchvision(device, features.round().contiguous(memory_format=torch.channels_last), boxes, (2, 2))


def _check_crowd(device):
    """More boxes on one spot than a list program reads in one step."""
    features, boxes = draw_features_and_boxes(1, 4, 5, 6, boxes=40, seed=2)
    boxes[:, 1:] = torch.tensor([1.0, 1, 4, 3]) + torch.arange(40)[:, None] % 2
    with mock.patch.object(regions, "BOXES_PER_STEP", 16):
        assert_like_torchvision(device, features.contiguous(memory_format=torch.channels_last), boxes, (1, 1))


def _check_regions(device):
    """Boxes that reach a region of 16 x 16 pixels by one row or column, whose pixels win the bins at the border."""
    features, _ = draw_features_and_boxes(1, 4, 19, 21, boxes=0, seed=3)
    boxes = torch.tensor([[0.0, 9, 8, 12, 16], [0, 8, 9, 16, 12], [0, 15, 3, 20, 4], [0, 3, 15, 4, 18]])
    assert_like_torchvision(device, features.contiguous(memory_format=torch.channels_last), boxes, (9, 9))


def _check_groups_of_regions(device):
    """Lists of boxes that are made for a few regions at a time."""
    with mock.patch.object(backward, "MAX_LIST_ENTRIES", 8):
        _check_pyramid(device)


VARIANTS: dict[str, Callable[[str], None]] = {
    "one map": _check_map,
    "one map, NCHW": partial(_check_map, layout=torch.contiguous_format),
    "one map, float64": partial(_check_map, dtype=torch.float64),
    "one map, blocks of channels": partial(_check_map, channels=257, size=(1, 2)),
    "one map, a scale that is no power of two": partial(_check_map, scale=0.37),
    "pyramid": partial(_check_pyramid, levels=3),
    "pyramid, NCHW": partial(_check_pyramid, layout=torch.contiguous_format),
    "pyramid, bfloat16, 16 bytes a load": partial(_check_pyramid, dtype=torch.bfloat16, channels=256),
    "pyramid, float16": partial(_check_pyramid, dtype=torch.float16, channels=8),
    "pyramid, float64": partial(_check_pyramid, dtype=torch.float64),
    "equal features": _check_ties,
    "boxes on one spot": _check_crowd,
    "several regions": _check_regions,
    "groups of regions": _check_groups_of_regions,
}
