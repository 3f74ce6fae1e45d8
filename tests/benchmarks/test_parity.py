"""What is taken for the same detections before detectors are timed, and what is not."""

from dataclasses import replace

import pytest
import torch

from benchmarks.harness import detectors
from benchmarks.harness.detectors import Found, same

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]


def found(exact=True):
    """Eleven by nine squares, labelled in turn, in each a mask and two keypoints."""
    corner = torch.cartesian_prod(torch.arange(11), torch.arange(9)) * 20.0
    boxes = torch.cat([corner, corner + 16], 1)
    masks = torch.zeros(99, 220, 180, dtype=torch.bool)
    for mask, (x, y) in zip(masks, corner.int().tolist(), strict=True):
        mask[x : x + 16, y : y + 12] = True
    scores = torch.linspace(0.9, 0.1, 99)
    return Found(boxes, scores, torch.arange(99) % 5, masks, boxes.reshape(99, 2, 2), exact)


def test_equals_may_change_places():
    order = torch.arange(99)
    order[[3, 4]] = order[[4, 3]]
    ours = found()
    moved = {name: getattr(ours, name)[order] for name in ("boxes", "labels", "masks", "keypoints")}
    assert same([ours, ours], [replace(ours, **moved), ours])


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
def test_what_differs_is_not_the_same(change, exact):
    ours = found(exact)
    assert not same([ours], [replace(ours, **change(ours))])


def test_rounding_is_forgiven_where_it_happens():
    ours = found(exact=False)
    near = replace(ours, boxes=ours.boxes + 1, scores=1.02 * ours.scores, keypoints=ours.keypoints + 1)
    assert same([ours], [near])
    assert not same([found()], [replace(near, exact=True)])


def test_torchvision_and_ours_find_the_same():
    size = (320, 320)
    theirs = detectors.torchvisions("R-18-FPN", size)
    images = [detectors.picture(*size)]
    expected = detectors.detect(detectors.ours(theirs), images)
    assert expected[0].exact
    assert same(expected, detectors.detect_torchvisions(theirs, images))
    with torch.autocast("cpu", torch.bfloat16):
        (rounded,) = detectors.detect_torchvisions(theirs, images)
    assert not rounded.exact
