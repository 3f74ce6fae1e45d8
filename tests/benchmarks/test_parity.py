"""Which detections count as the same before detectors are timed, and which do not."""

from dataclasses import replace

import pytest
import torch

from tests.oracles import detections, detectors
from tests.oracles.detections import HostDetections, same

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]


def made_up(exact=True):
    """Eleven by nine squares with labels in turn, each with a mask and two keypoints."""
    corner = torch.cartesian_prod(torch.arange(11), torch.arange(9)) * 20.0
    boxes = torch.cat([corner, corner + 16], 1)
    masks = torch.zeros(99, 220, 180, dtype=torch.bool)
    for mask, (x, y) in zip(masks, corner.int().tolist(), strict=True):
        mask[x : x + 16, y : y + 12] = True
    scores = torch.linspace(0.9, 0.1, 99)
    return HostDetections(boxes, scores, torch.arange(99) % 5, masks, boxes.reshape(99, 2, 2), exact)


def test_detections_of_equal_scores_may_swap():
    order = torch.arange(99)
    order[[3, 4]] = order[[4, 3]]
    expected = made_up()
    moved = {name: getattr(expected, name)[order] for name in ("boxes", "labels", "masks", "keypoints")}
    assert same([expected, expected], [replace(expected, **moved), expected])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda f: {"boxes": f.boxes + 6},
        lambda f: {"labels": f.labels.flip(0) + 1},
        lambda f: {"scores": 0.6 * f.scores},
        lambda f: {"scores": f.scores * torch.nan},
        lambda f: {"masks": f.masks.flip(0)},
        lambda f: {"keypoints": f.keypoints + 10},
        lambda f: {"boxes": f.boxes[:50], "scores": f.scores[:50], "labels": f.labels[:50]},
    ],
    ids=["boxes", "labels", "scores", "nan", "masks", "keypoints", "number"],
)
def test_different_detections_are_not_the_same(change, exact):
    expected = made_up(exact)
    assert not same([expected], [replace(expected, **change(expected))])


def test_rounding_is_allowed_in_reduced_precision():
    rounded = made_up(exact=False)
    near = replace(rounded, boxes=rounded.boxes + 1, scores=1.02 * rounded.scores, keypoints=rounded.keypoints + 1)
    assert same([rounded], [near])
    assert not same([made_up()], [replace(near, exact=True)])


def test_torchvision_and_fastmask_detect_the_same():
    size = (320, 320)
    peer = detectors.torchvision_detector("R-18-FPN", size)
    images = [detectors.textured_image(*size)]
    result = detections.detect(detectors.fastmask_detector(peer), images)
    assert result[0].exact
    assert same(result, detections.detect_torchvision(peer, images))
    with torch.autocast("cpu", torch.bfloat16):
        (rounded,) = detections.detect_torchvision(peer, images)
    assert not rounded.exact
