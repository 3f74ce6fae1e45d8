"""Matching by torchvision and by loops over boxes, inputs for it, and a check for each variant of the kernels."""

from __future__ import annotations

import math
from functools import partial
from unittest.mock import patch

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

import fastmask
from fastmask.kernels.match_boxes import forward

NAN, INF = math.nan, math.inf
THRESHOLDS = (0.6, 0.3)


def draw_boxes(n, seed, spread=60, dtype=torch.float32):
    """Boxes with whole coordinates, so that IoUs repeat, sorted by rows, as anchors are."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(spread, (n, 2), generator=g)
    corner = corner[(corner[:, 1] * spread + corner[:, 0]).argsort()]
    size = torch.randint(1, spread // 3, (n, 2), generator=g)
    return torch.cat([corner, corner + size], 1).to(dtype)


def degenerate_boxes():
    """Boxes without area, inverted, non-finite, huge and tiny, and some with an area."""
    rows = [
        [5, 5, 5, 5],
        [NAN, 0, 9, 9],
        [0, 0, NAN, 9],
        [0, 0, INF, 9],
        [-INF, -INF, INF, INF],
        [9, 9, 3, 3],
        [9, 3, 3, 9],
        [3, 9, 9, 3],
        [0, 0, 9, 9],
        [0, 0, 9, 8],
        [-3e38, -3e38, 3e38, 3e38],
        [-1e19, -1e19, 1e19, 0.8e19],
        [-9e18, -9e18, 9e18, 9e18],
        [0, 0, 1e-19, 1e-19],
        [0, 0, 1e-19, 0.7e-19],
        [0, 0, 1e-22, 1e-22],
        [0, 0, 1e-22, 0.6e-22],
        [0, 0, 1e-30, 9],
        [7, 0, 7 + 1e-5, 9],
        [0, 0, 0, 9],
    ]
    return torch.tensor(rows, dtype=torch.float32)


def torchvision_oracle(boxes, objects, high, low, low_quality):
    """Matches and labels of `[N, 4]` boxes by torchvision's `Matcher`, where G >= 1.

    Objects that overlap no box are withheld from its low-quality rule.
    """
    iou = box_iou(objects, boxes).nan_to_num(0)
    matches = iou.max(0).indices
    overlapping = iou[iou.amax(1) > 0]
    if not len(overlapping):
        overlapping, low_quality = iou, False
    found = Matcher(high, low, low_quality)(overlapping)
    labels = torch.where(found >= 0, 1, torch.where(found == Matcher.BELOW_LOW_THRESHOLD, 0, -1))
    return matches, labels.to(torch.int8)


def loop_oracle(boxes, objects, high, low, low_quality, crowds=(), crowd_overlap=0.7):
    """Matches and labels of `[N, 4]` boxes by loops over numbers in float64."""

    def area(box):
        return (box[2] - box[0]) * (box[3] - box[1])

    def common(a, b):
        sides = (min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))
        return max(sides[0], 0) * max(sides[1], 0)

    def iou(a, b):
        union = area(a) + area(b) - common(a, b)
        return common(a, b) / union if union else 0.0

    boxes, objects, crowds = ([[float(x) for x in row] for row in part] for part in (boxes, objects, crowds))
    matches, labels = [], []
    highest = [max(iou(box, gt) for box in boxes) for gt in objects]
    for box in boxes:
        values = [iou(box, gt) for gt in objects]
        best = max(values, default=0.0)
        matches.append(values.index(best) if values else 0)
        label = 1 if values and best >= high else -1 if values and best >= low else 0
        if low_quality and any(value == most > 0 for value, most in zip(values, highest, strict=True)):
            label = 1
        if label == 0 and any(common(box, crowd) / max(area(box), 1e-6) >= crowd_overlap for crowd in crowds):
            label = -1
        labels.append(label)
    return torch.tensor(matches), torch.tensor(labels, dtype=torch.int8)


def padded(tensors, size, fill=NAN):
    """`[B, size, 4]` of lists of `[K, 4]` boxes, and their counts; `fill` beyond them."""
    out = torch.full((len(tensors), size, 4), fill, dtype=tensors[0].dtype)
    for row, tensor in zip(out, tensors, strict=True):
        row[: len(tensor)] = tensor
    return out, torch.tensor([len(tensor) for tensor in tensors])


def check_matched(
    device,
    *,
    n=300,
    objects=(5, 0, 40),
    low_quality=True,
    shared=True,
    counted=False,
    dtype=torch.float32,
    boxes=None,
    spread=60,
    thresholds=THRESHOLDS,
):
    """A batch of images with `objects` objects each is matched as by torchvision."""
    batch = len(objects)
    if boxes is None:
        boxes = [draw_boxes(n, seed, spread, dtype) for seed in range(batch)]
    else:
        boxes = [boxes.to(dtype)] * batch
    gt = [draw_boxes(count, 100 + seed, spread, dtype) for seed, count in enumerate(objects)]
    gt_boxes, gt_counts = padded(gt, max(objects) + 1)
    counts = None
    if counted:
        counts = torch.tensor([len(boxes[0]), 0, *[len(boxes[0]) // 2] * batch][:batch])
    given = boxes[0] if shared else torch.stack(boxes)
    matches, labels = fastmask.match_boxes(
        given.to(device),
        gt_boxes.to(device),
        gt_counts.to(device),
        *thresholds,
        low_quality=low_quality,
        counts=None if counts is None else counts.to(device),
    )
    assert (matches.dtype, labels.dtype) == (torch.int64, torch.int8)
    assert matches.shape == labels.shape == (batch, len(boxes[0]))
    for image in range(batch):
        of_image = boxes[0 if shared else image]
        count = len(of_image) if counts is None else int(counts[image])
        match = torch.zeros(len(of_image), dtype=torch.int64)
        label = torch.full((len(of_image),), -1, dtype=torch.int8)
        label[:count] = 0
        if objects[image] and count:
            found = torchvision_oracle(of_image[:count], gt[image], *thresholds, low_quality)
            match[:count], label[:count] = found
        assert torch.equal(matches[image].cpu(), match)
        assert torch.equal(labels[image].cpu(), label)


def check_degenerate(device, dtype=torch.float32):
    """Degenerate boxes and objects are matched as by torchvision, whose IoUs of NaN count as 0."""
    boxes = degenerate_boxes().to(dtype)
    objects = torch.cat([boxes, draw_boxes(5, 3, 12, dtype)])
    for low_quality in (False, True):
        expected = torchvision_oracle(boxes, objects, 0.5, 0.4, low_quality)
        counts = torch.tensor([len(objects)], device=device)
        actual = fastmask.match_boxes(
            boxes.to(device), objects[None].to(device), counts, 0.5, 0.4, low_quality=low_quality
        )
        assert torch.equal(actual[0][0].cpu(), expected[0])
        assert torch.equal(actual[1][0].cpu(), expected[1])


def check_crowds(device, dtype=torch.float32, crowd_overlap=0.7, n=140):
    """Negatives in a crowd region are ignored, with and without objects."""
    boxes = draw_boxes(n, 1, 60, dtype)
    gt = [draw_boxes(count, 7 + count, 60, dtype) for count in (3, 0)]
    regions = [draw_boxes(count, 9 + count, 90, dtype) * 1.25 for count in (2, 40)]
    gt_boxes, gt_counts = padded(gt, 4)
    crowds, crowd_counts = padded(regions, 43, fill=1e4)
    options = {"low_quality": True, "crowd_overlap": crowd_overlap}
    matches, labels = fastmask.match_boxes(
        boxes.to(device),
        gt_boxes.to(device),
        gt_counts.to(device),
        *THRESHOLDS,
        crowds=crowds.to(device),
        crowd_counts=crowd_counts.to(device),
        **options,
    )
    for image in range(2):
        match, label = loop_oracle(boxes, gt[image], *THRESHOLDS, True, regions[image], crowd_overlap)
        assert torch.equal(matches[image].cpu(), match)
        assert torch.equal(labels[image].cpu(), label)


def grid_anchors(height, width, stride=8, sides=(16, 24)):
    """Anchors of a feature map, position by position; their IoUs with large and with small objects repeat."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre = torch.stack([x, y], -1).view(-1, 1, 2) * float(stride)
    half = torch.tensor([[side, side * ratio] for side in sides for ratio in (0.5, 1, 2)]) / 2
    return torch.cat([centre - half, centre + half], -1).view(-1, 4)


def check_large(device, **options):
    """Tiles as for many boxes, and a few of them at a time in the low-quality rule."""
    with patch.object(forward, "SMALL", 0), patch.object(forward, "TILES", 4):
        check_matched(device, **options)


VARIANTS = {
    "tiles of many boxes": partial(check_large, n=700, objects=(40, 3)),
    "tiles of many boxes, float64": partial(check_large, n=300, objects=(9,), dtype=torch.float64),
    "one spot in tiles of many boxes": partial(
        check_large, boxes=torch.tensor([[10.0, 10, 30, 40]]).repeat(700, 1), objects=(9,)
    ),
    "shared anchors": check_matched,
    "boxes of each image": partial(check_matched, shared=False),
    "boxes of each image, counted": partial(check_matched, shared=False, counted=True),
    "high quality only": partial(check_matched, low_quality=False, shared=False, counted=True),
    "float64": partial(check_matched, dtype=torch.float64, n=150),
    "float16": partial(check_matched, dtype=torch.float16, n=150, objects=(3, 2)),
    "more objects than a group": partial(check_matched, n=130, objects=(70, 33)),
    "anchors of a grid": partial(check_matched, boxes=grid_anchors(7, 9), objects=(12, 1), thresholds=(0.7, 0.3)),
    "one spot": partial(check_matched, boxes=torch.tensor([[10.0, 10, 30, 40]]).repeat(260, 1), objects=(9,)),
    "one box": partial(check_matched, n=1, objects=(2, 0)),
    "no objects": partial(check_matched, n=20, objects=(0, 0)),
    "threshold 0": partial(check_matched, n=40, objects=(3, 0), thresholds=(0.0, 0.0)),
    "degenerate": check_degenerate,
    "degenerate, float64": partial(check_degenerate, dtype=torch.float64),
    "crowds": check_crowds,
    "crowds, float64": partial(check_crowds, dtype=torch.float64, n=60),
    "crowds, overlap 0": partial(check_crowds, crowd_overlap=0.0, n=40),
    "crowds, overlap 1": partial(check_crowds, crowd_overlap=1.0, n=40),
}
