"""Inputs of NMS for tests, and greedy suppression as a loop over boxes."""

import torch


def draw_candidates(n, seed, spread=60.0, kind="random"):
    """Boxes and scores; of 150 random boxes about half are suppressed at a threshold of 0.4."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, generator=g)
    if kind == "disjoint":
        corner = torch.stack([torch.arange(n) % 150, torch.arange(n) // 150], 1) * 20.0
        return torch.cat([corner, corner + 10], 1), scores
    if kind == "stacked":
        corner = torch.rand(n, 2, generator=g)
        return torch.cat([corner, corner + 100], 1), scores
    centre = torch.rand(n, 2, generator=g) * spread
    size = torch.exp(torch.randn(n, 2, generator=g) * 0.5 + 2.5)
    if kind == "clustered":
        near = torch.randint(max(n // 20, 1), (n,), generator=g)
        centre = centre[near] + torch.randn(n, 2, generator=g)
        size = size[near] * torch.exp(torch.randn(n, 2, generator=g) * 0.1)
    return torch.cat([centre - size / 2, centre + size / 2], 1), scores


def greedy_nms(boxes, scores, threshold, classes=None):
    """Indices of the kept boxes, one after the other, in torchvision's precision and order."""
    boxes = boxes.cpu().to(torch.promote_types(boxes.dtype, torch.float32))
    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    scores = scores.tolist()
    remaining = torch.tensor(sorted(range(len(boxes)), key=lambda i: (scores[i] == scores[i], -scores[i])))
    kept = []
    while len(remaining):
        i, remaining = remaining[0].item(), remaining[1:]
        kept.append(i)
        width = (x2.minimum(x2[i]) - x1.maximum(x1[i])).clamp(min=0)
        height = (y2.minimum(y2[i]) - y1.maximum(y1[i])).clamp(min=0)
        iou = width * height / (area[i] + area - width * height)
        hit = (iou.double() > threshold) & (classes == classes[i] if classes is not None else True)
        remaining = remaining[~hit[remaining]]
    return torch.tensor(kept, dtype=torch.int64)


def greedy_nms_padded(boxes, scores, threshold, max_output, classes=None, counts=None, score_threshold=None):
    """`nms_padded` by `greedy_nms` of each segment's valid boxes."""
    indices = torch.full((len(boxes), max_output), -1)
    num_kept = torch.zeros(len(boxes), dtype=torch.int64)
    for b in range(len(boxes)):
        valid = torch.ones(scores.shape[1], dtype=torch.bool)
        if counts is not None:
            valid[max(int(counts[b]), 0) :] = False
        if score_threshold is not None:
            valid &= scores[b] > score_threshold
        (valid,) = valid.nonzero(as_tuple=True)
        class_of_valid = classes[b, valid] if classes is not None else None
        kept = valid[greedy_nms(boxes[b, valid], scores[b, valid], threshold, class_of_valid)][:max_output]
        num_kept[b] = len(kept)
        indices[b, : len(kept)] = kept
    return indices, num_kept


def assert_same_indices(actual, expected):
    """Each of the int64 tensors `actual` equals its counterpart."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a.cpu(), e)
