"""Matching and sampling, by hand and by counting."""

import pytest
import torch

from models.config import SamplingConfig
from models.network.matching import IGNORED, NEGATIVE, POSITIVE, match, sample, sample_proposals
from models.structures import Proposals, Target

pytestmark = pytest.mark.reference_only

BOXES = torch.tensor(
    [
        [0, 0, 10, 10],  # the first object itself
        [0, 0, 10, 20],  # IoU 0.5 with it
        [0, 0, 10, 25],  # 0.4
        [30, 0, 40, 10],  # overlaps no object
        [50, 50, 60, 58],  # 0.4 with the second object, whose best box it is
    ]
).float()
TARGET = Target(
    boxes=torch.tensor([[0, 0, 10, 10], [50, 50, 70, 60]]).float(),
    labels=torch.tensor([1, 2]),
    crowds=torch.zeros(0, 4),
)


def test_thresholds_are_inclusive():
    matches, kinds = match(BOXES, TARGET, 0.5, 0.4, crowd_overlap=0.7)
    assert kinds.tolist() == [POSITIVE, POSITIVE, IGNORED, NEGATIVE, IGNORED]
    assert matches[:3].tolist() == [0, 0, 0]
    assert matches[4] == 1


def test_every_object_gets_its_best_box():
    _, kinds = match(BOXES, TARGET, 0.7, 0.3, crowd_overlap=0.7, best_for_each=True)
    assert kinds.tolist() == [POSITIVE, IGNORED, IGNORED, NEGATIVE, POSITIVE]
    far = Target(torch.tensor([[500.0, 500, 510, 510]]), torch.tensor([1]), torch.zeros(0, 4))
    _, kinds = match(BOXES, far, 0.7, 0.3, crowd_overlap=0.7, best_for_each=True)
    assert kinds.tolist() == [NEGATIVE] * 5  # an IoU of 0 makes no box positive


def test_without_objects_every_box_is_background():
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    matches, kinds = match(BOXES, empty, 0.5, 0.5, crowd_overlap=0.7)
    assert kinds.tolist() == [NEGATIVE] * 5
    assert matches.tolist() == [0] * 5


def test_a_box_without_area_is_background():
    _, kinds = match(torch.zeros(1, 4), TARGET, 0.5, 0.5, crowd_overlap=0.7)
    assert kinds.tolist() == [NEGATIVE]


def test_negatives_in_a_crowd_are_ignored():
    crowd = torch.tensor([[33.0, 0, 100, 100], [0, 0, 10, 24]])  # covers 0.7 of the fourth box and all of the last
    target = Target(TARGET.boxes, TARGET.labels, crowd)
    _, kinds = match(BOXES, target, 0.5, 0.5, crowd_overlap=0.7)
    assert kinds.tolist() == [POSITIVE, POSITIVE, IGNORED, IGNORED, IGNORED]
    _, kinds = match(BOXES, target, 0.5, 0.5, crowd_overlap=0.71)
    assert kinds.tolist() == [POSITIVE, POSITIVE, IGNORED, NEGATIVE, IGNORED]


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        (10, 90, (4, 12)),  # a quarter of 16 is positive
        (2, 90, (2, 14)),  # negatives replace missing positives
        (10, 5, (4, 5)),  # positives do not replace missing negatives
        (0, 90, (0, 16)),
        (0, 0, (0, 0)),
    ],
)
def test_numbers_of_samples(positives, negatives, expected):
    kinds = torch.full((2, 100), IGNORED)
    kinds[0, :positives] = POSITIVE
    kinds[0, 100 - negatives :] = NEGATIVE
    torch.manual_seed(0)
    index, valid = sample(kinds, 16, 0.25)
    assert index.shape == valid.shape == (2, 16)
    drawn = kinds[0, index[0][valid[0]]]
    assert ((drawn == POSITIVE).sum(), (drawn == NEGATIVE).sum()) == expected
    assert (drawn[: expected[0]] == POSITIVE).all()
    assert valid[0, : sum(expected)].all()
    assert len(set(index[0][valid[0]].tolist())) == sum(expected)
    assert not valid[1].any()


def test_samples_are_drawn_uniformly():
    torch.manual_seed(0)
    kinds = torch.full((4000, 10), NEGATIVE)
    index, valid = sample(kinds, 4, 0.25)
    assert valid.all()
    counts = index.flatten().bincount(minlength=10)
    assert (counts - 1600).abs().max() < 160  # five standard deviations


def test_more_samples_than_boxes():
    kinds = torch.tensor([[POSITIVE, NEGATIVE, IGNORED]])
    index, valid = sample(kinds, 10**6, 0.5)
    assert index.shape == (1, 3)
    assert index[valid].tolist() == [0, 1]


def test_proposals_are_sampled_with_the_ground_truth():
    """Two images: the first has two proposals and an empty slot, and two objects; the second has no objects."""
    boxes = torch.stack([BOXES[[1, 3, 0]], BOXES[[0, 1, 2]]])
    proposals = Proposals(boxes, torch.tensor([2, 3]))
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    torch.manual_seed(0)
    samples = sample_proposals(proposals, [TARGET, empty], SamplingConfig(rois_per_image=12))
    assert samples.boxes.shape == (2, 5, 4)
    first = {(tuple(box), label, match) for box, label, match in zip(*(t[0].tolist() for t in samples), strict=True)}
    assert {row for row in first if row[1] >= 0} == {
        ((0, 0, 10, 20), 1, 0),
        ((30, 0, 40, 10), 0, 0),
        ((0, 0, 10, 10), 1, 0),  # the first object
        ((50, 50, 70, 60), 2, 1),  # the second
    }
    assert sorted(samples.labels[1].tolist()) == [-1, -1, 0, 0, 0]

    positives = samples.positives()
    assert [len(boxes) for boxes in positives.boxes] == [3, 0]
    assert [len(matches) for matches in positives.matches] == [3, 0]
    assert sorted(positives.labels.tolist()) == [1, 1, 2]
