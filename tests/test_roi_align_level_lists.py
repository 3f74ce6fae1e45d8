"""The lists of boxes by image and level against the reference's choice of levels. Only kernels use them."""

import math

import pytest

from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.roi_align import level_lists
from fastmask.kernels.roi_align.levels import assign_fpn_levels
from fastmask.kernels.roi_align.op import RoIAlignSpec
from tests.conftest import DEVICES
from tests.oracles.roi_align import draw_boxes

KERNEL_DEVICES = DEVICES if INTERPRETED else [device for device in DEVICES if device != "cpu"]
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def check_lists(count, images, levels, device):
    """Boxes that have no image, are not finite or have no level are in no list; the others are in theirs, in order."""
    boxes = draw_boxes(count, images, 600, seed=3)
    unpooled = [(0, -1), (0, images), (0, math.nan), (1, math.nan), (3, math.inf), (3, -1e3)]
    for row, (column, value) in enumerate(unpooled):
        boxes[row : row + 1, column] = value
    spec = RoIAlignSpec(7, 7, SCALES[:levels], 2, False, "mean")
    thresholds = spec.thresholds(boxes.dtype)
    listed, counts = level_lists.list_boxes_by_level(boxes.to(device), images, levels, thresholds)
    assert listed.shape == (images * levels, count)
    level = assign_fpn_levels(boxes[:, 1:], spec.spatial_scales, spec.rule)
    finite = (boxes[:, 3:] - boxes[:, 1:3]).isfinite().all(1)
    total = 0
    for row in range(images * levels):
        image, index = divmod(row, levels)
        expected = ((boxes[:, 0] == image) & (level == index) & finite).nonzero()[:, 0]
        assert listed[row, : counts[row]].tolist() == expected.tolist()
        total += len(expected)
    assert max(count - 6, 0) <= total <= max(count - 5, 0)  # one level also takes the box of negative area


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("count", "images", "levels"), [(0, 2, 2), (30, 1, 1), (500, 3, 4), (150, 2, 4)])
def test_every_box_is_in_the_list_of_its_image_and_level(count, images, levels, device, monkeypatch):
    monkeypatch.setattr(level_lists, "BOXES_PER_STEP", 128)
    check_lists(count, images, levels, device)
