"""Sampling of proposals, by hand. `tests/test_match_boxes.py` and `tests/test_sample_matches.py` have the operators."""

import pytest
import torch

from models.config import SamplingConfig
from models.network.matching import sample_proposals
from models.structures import Proposals, Target, pad_targets

pytestmark = pytest.mark.reference_only

BOXES = torch.tensor(
    [
        [0, 0, 10, 10],  # the first object itself
        [0, 0, 10, 20],  # IoU 0.5 with it
        [0, 0, 10, 25],  # 0.4
        [30, 0, 40, 10],  # overlaps no object
    ]
).float()
TARGET = Target(
    boxes=torch.tensor([[0, 0, 10, 10], [50, 50, 70, 60]]).float(),
    labels=torch.tensor([1, 2]),
    crowds=torch.zeros(0, 4),
)
EMPTY = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


def drawn(proposals, targets):
    torch.manual_seed(0)
    return sample_proposals(proposals, pad_targets(targets), SamplingConfig(rois_per_image=12))


def test_proposals_are_sampled_with_the_ground_truth():
    """Two images: the first has two proposals and an empty slot, and two objects; the second has no objects."""
    proposals = Proposals(torch.stack([BOXES[[1, 3, 0]], BOXES[[0, 1, 2]]]), torch.tensor([2, 3]))
    samples = drawn(proposals, [TARGET, EMPTY])
    assert samples.boxes.shape == (2, 5, 4)
    first = {(tuple(box), label, match) for box, label, match in zip(*(t[0].tolist() for t in samples), strict=True)}
    assert {row for row in first if row[1] >= 0} == {
        ((0, 0, 10, 20), 1, 0),
        ((30, 0, 40, 10), 0, 0),
        ((0, 0, 10, 10), 1, 0),  # the first object
        ((50, 50, 70, 60), 2, 1),  # the second
    }
    assert sorted(samples.labels[1].tolist()) == [-1, -1, 0, 0, 0]

    positives = samples.positives(4)
    assert sorted(positives.labels[0].tolist()) == [0, 1, 1, 2]
    assert positives.labels[1].tolist() == [0] * 4
    compact = positives.compact()
    assert sorted(compact.labels[0].tolist()) == [1, 1, 2]
    assert compact.boxes.shape == (2, 3, 4)
    assert samples.positives(0).labels.shape == (2, 0)


def test_background_in_a_crowd_is_not_sampled():
    crowd = Target(TARGET.boxes, TARGET.labels, torch.tensor([[33.0, 0, 100, 100]]))  # covers 0.7 of the last box
    proposals = Proposals(BOXES[None, [3, 2]], torch.tensor([2]))
    samples = drawn(proposals, [crowd])
    assert [
        tuple(box) for box, label in zip(samples.boxes[0].tolist(), samples.labels[0], strict=True) if label == 0
    ] == [(0, 0, 10, 25)]


def test_without_positive_samples_one_slot_stays():
    samples = drawn(Proposals(BOXES[None], torch.tensor([4])), [EMPTY])
    compact = samples.positives(3).compact()
    assert compact.labels.tolist() == [[0]]
