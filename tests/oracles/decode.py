"""Boxes decoded in float64, and the comparison of selected boxes with an oracle's."""

import torch

from tests.oracles.budget import assert_within_budget


def decode_oracle(deltas, anchors, image_sizes, weights=(1.0, 1.0, 1.0, 1.0)):
    """Boxes before and after clipping, both float64 `[N, 4]`, of as many deltas and anchors in one image."""
    dx, dy, dw, dh = (deltas.double() / torch.tensor(weights, dtype=torch.float64)).unbind(-1)
    x1, y1, x2, y2 = anchors.double().unbind(-1)
    height, width = image_sizes.double().tolist()
    half_width = dw.clamp(max=torch.tensor(62.5, dtype=torch.float64).log()).exp() * (x2 - x1) / 2
    half_height = dh.clamp(max=torch.tensor(62.5, dtype=torch.float64).log()).exp() * (y2 - y1) / 2
    x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    boxes = torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], -1)
    limit = torch.tensor([width, height, width, height], dtype=torch.float64)
    return boxes, boxes.clamp(min=0).minimum(limit)


def is_valid(boxes, clipped, min_size, inclusive, drop_non_finite):
    """Which boxes take part."""
    sides = clipped[:, 2:] - clipped[:, :2]
    limit = -torch.inf if min_size is None else min_size
    valid = (sides >= limit if inclusive else sides > limit).all(1)
    return valid & boxes.float().isfinite().all(1) if drop_non_finite else valid  # float32 overflows


def pad(rows, size, like):
    """A list of `[n_b, ...]` tensors as `[B, size, ...]`, cut and padded with zeros."""
    out = torch.zeros(len(rows), size, *like.shape, dtype=like.dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row[:size]
    return out


def assert_selected(actual, expected, extent):
    """Boxes and scores within the budget, labels and counts equal; boxes reach `extent` pixels."""
    assert all(a.shape == e.shape for a, e in zip(actual, expected, strict=True))
    assert torch.equal(actual[-1].cpu(), expected[-1]), "counts"
    for a, e in zip(actual[2:-1], expected[2:-1], strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a.cpu(), e), "labels"
    assert_within_budget(actual[0], expected[0], torch.full_like(expected[0], extent))
    infinite = expected[1].isinf()
    assert torch.equal(actual[1].cpu().double()[infinite], expected[1][infinite]), "infinite scores"
    scores, exact = actual[1].masked_fill(infinite.to(actual[1].device), 0.0), expected[1].masked_fill(infinite, 0.0)
    assert_within_budget(scores, exact, exact.abs() + 1e-3)
