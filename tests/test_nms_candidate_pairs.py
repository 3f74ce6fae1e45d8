"""The search for candidate pairs against all pairs: none that can suppress is missing, and few are listed."""

import pytest
import torch

from benchmarks.harness.workloads import candidates
from fastmask.kernels.nms import candidate_pairs
from tests.oracles.nms import draw_candidates

pytestmark = pytest.mark.reference_only

GROUPS = 40


def edge_boxes(kind, n=300):
    """Boxes that strain the search for candidates: far coordinates, all sizes, no area, no finite side."""
    g = torch.Generator().manual_seed(5)
    boxes, _ = draw_candidates(n, 5)
    if kind == "all sizes":
        side = torch.exp(torch.rand(n, 2, generator=g) * 60 - 40)
        boxes = torch.cat([boxes[:, :2] * side, boxes[:, :2] * side + side], 1)
    elif kind == "far away":
        boxes = torch.cat([boxes, boxes * 1e3 + 1e7, boxes[:20] * 1e25])
    elif kind == "one column":
        boxes[:, [0, 2]] = torch.tensor([3.0, 9.0])
    elif kind == "degenerate":
        boxes = torch.cat([boxes, boxes[:40, [2, 1, 0, 3]], boxes[:40, [2, 3, 0, 1]], boxes[:40, [0, 1, 0, 3]]])
    elif kind == "equal and huge":
        boxes = torch.tensor([[0.0, 0, 1e14, 1]]).repeat(n, 1)
        boxes[::2, 0] = 1e13
    elif kind == "subnormal":
        x = 4.0 * torch.arange(n // 2)
        x = torch.cat([x, x + 0.0859375])
        boxes = torch.stack([x, torch.zeros(n), x + 0.6, torch.full((n,), 2.0**-149)], 1)
    elif kind == "float64, far away":
        far = torch.tensor([[2.0**53 - 2, 0, 2.0**53 + 8, 1], [2.0**53 - 3, 0, 2.0**53 + 8, 1]], dtype=torch.float64)
        boxes = torch.cat([boxes.double(), far])
    elif kind == "not finite":
        boxes[::7, 1], boxes[3::11, 2], boxes[5::13] = torch.nan, torch.inf, torch.inf
    near = boxes[:60] + 0.02 * (boxes[:60, 2:] - boxes[:60, :2]).repeat(1, 2)
    copies = boxes[len(boxes) % GROUPS :][:60]  # in the groups of their originals
    return torch.cat([boxes, copies, near])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("threshold", [0, 1e-3, 0.3, 0.7, 0.999999, 1])
@pytest.mark.parametrize(
    "kind",
    [
        "all sizes",
        "far away",
        "one column",
        "degenerate",
        "equal and huge",
        "subnormal",
        "float64, far away",
        "not finite",
        "random",
    ],
)
def test_candidate_pairs_are_all_that_can_suppress(kind, threshold, grouped, monkeypatch):
    monkeypatch.setattr(candidate_pairs, "MAX_PAIRS", 1000)
    boxes = edge_boxes(kind)
    group = torch.arange(len(boxes)) % GROUPS if grouped else None
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    extent = torch.cat([-boxes[:, :2], boxes[:, 2:]], 1).t()
    pairs = candidate_pairs.find_candidate_pairs(extent, area, group, threshold)
    listed = torch.zeros(len(boxes), len(boxes), dtype=torch.bool)
    for first, second in candidate_pairs.list_pairs(pairs):
        listed[pairs.order[first], pairs.order[second]] = True
    side = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
    intersection = side.clamp(min=0).prod(2)
    hits = intersection / (area[:, None] + area - intersection) > threshold
    assert not listed.diagonal().any()
    if group is not None:
        hits &= group[:, None] == group
        assert not (listed & (group[:, None] != group)).any()
    missing = hits.triu(1) & ~(listed | listed.t())
    assert not missing.any()
    assert hits.triu(1).any() or threshold == 1


def test_candidate_pairs_are_few():
    boxes, _ = candidates(2000)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    pairs = candidate_pairs.find_candidate_pairs(torch.cat([-boxes[:, :2], boxes[:, 2:]], 1).t(), area, None, 0.7)
    assert pairs.partners.sum() < 0.03 * 2000 * 1999 / 2
    assert sum(len(first) for first, _ in candidate_pairs.list_pairs(pairs)) == pairs.partners.sum()
