"""Soft NMS in plain Python, in float64; a check that allows for ties; and the kernel's variants."""

import math
from functools import partial
from unittest.mock import patch

import torch

from fastmask.kernels.soft_nms import METHODS, forward, reference, soft_nms
from tests.oracles.nms import draw_candidates

NAN, INF = float("nan"), float("inf")
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def iou(a, b):
    """The IoU of two boxes; 0 where they do not overlap or an area is not finite, in float32."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if not (width > 0 and height > 0):
        return 0.0
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    if not (abs(area_a) < 3.4e38 and abs(area_b) < 3.4e38):
        return 0.0
    return width * height / (area_a + area_b - width * height)


def decay(overlap, options):
    """The factor of a score, and the relative error that a rounding of the IoU may give it, in units of epsilon."""
    if options["method"] == "linear":
        weight = 1 - overlap if overlap > options["iou_threshold"] else 1.0
        return weight, 2 + 3 / max(weight, 1e-30)
    exponent = overlap * overlap / options["sigma"]
    return math.exp(-exponent), 4 + 6 * exponent


def soft_nms_by_hand(boxes, scores, classes, options):
    """Indices and scores of one segment, in the order of selection: the first equations of the paper, as a loop."""
    boxes, remaining = boxes.double().tolist(), dict(enumerate(scores.double().tolist()))
    indices, selected = [], []
    while True:
        remaining = {i: score for i, score in remaining.items() if score >= options["score_threshold"]}
        if not remaining or len(indices) == options["max_output"]:
            return indices, selected
        best = max(remaining, key=lambda i: (remaining[i], -i))
        indices.append(best)
        selected.append(remaining.pop(best))
        for i in remaining:
            if classes is None or classes[i] == classes[best]:
                remaining[i] *= decay(iou(boxes[i], boxes[best]), options)[0]


def assert_follows(indices, selected, boxes, scores, classes, options):
    """Each selected box has the highest score, and that score, if the boxes before it were selected; up to rounding.

    Unlike a comparison of indices this allows for boxes whose scores differ by rounding alone.
    """
    computed, limit = EPSILON[torch.promote_types(boxes.dtype, torch.float32)], options["score_threshold"]
    rounded = 0.0 if selected.dtype == torch.float64 else EPSILON[selected.dtype]
    boxes, scores = boxes.double().tolist(), scores.double().tolist()
    least, most = ({i: score for i, score in enumerate(scores) if score >= limit} for _ in range(2))
    indices, selected = indices.tolist(), selected.double().tolist()
    count = sum(index >= 0 for index in indices)
    assert len(indices) == options["max_output"]
    assert indices[count:] == [-1] * (len(indices) - count)
    assert selected[count:] == [0.0] * (len(indices) - count)
    for best, score in zip(indices[:count], selected[:count], strict=True):
        assert least[best] * (1 - rounded) - 1e-37 <= score <= most[best] * (1 + rounded) + 1e-37
        highest = most.pop(best)
        least.pop(best)
        assert highest >= max(least.values(), default=limit)
        for i in list(least):
            if classes is None or classes[i] == classes[best]:
                weight, error = decay(iou(boxes[i], boxes[best]), options)
                least[i] *= weight * max(1 - error * computed, 0)
                most[i] *= weight * (1 + error * computed) + (weight == 0) * error * computed
                if most[i] < limit:
                    least.pop(i)
                    most.pop(i)
    if count < len(indices):
        assert all(score < limit for score in least.values()) or (limit == 0 and not any(least.values()))


def check_soft_nms(
    device,
    *,
    n=90,
    segments=1,
    max_output=20,
    dtype=torch.float32,
    kind="clustered",
    boxes=None,
    scores=None,
    classes=None,
    counts=None,
    max_tile=forward.MAX_TILE,
    min_window=reference.MIN_WINDOW,
    spread=60.0,
    exact=True,
    **options,
):
    """A padded call agrees with the loop; index for index if `exact`, else up to rounding."""
    options = {"iou_threshold": 0.3, "method": "linear", "sigma": 0.5, "score_threshold": 0.05, **options}
    drawn = [draw_candidates(n, seed, spread, kind) for seed in range(segments)]
    boxes = torch.stack([box for box, _ in drawn]).to(dtype) if boxes is None else boxes.expand(segments, -1, -1)
    scores = torch.stack([score for _, score in drawn]).to(dtype) if scores is None else scores.expand(segments, -1)
    scores = scores[:, : boxes.shape[1]]
    if isinstance(classes, torch.dtype):
        classes = (torch.arange(scores.numel()).view(scores.shape) * 7 % 5 % 3).to(classes)
    with patch.object(forward, "MAX_TILE", max_tile), patch.object(reference, "MIN_WINDOW", min_window):
        indices, selected = soft_nms(
            boxes.to(device),
            scores.to(device),
            max_output=max_output,
            classes=None if classes is None else classes.to(device),
            counts=None if counts is None else torch.tensor(counts, device=device),
            **options,
        )
    assert (indices.dtype, selected.dtype) == (torch.int64, scores.dtype)
    assert indices.shape == selected.shape == (segments, max_output)
    options["max_output"] = max_output
    for b in range(segments):
        last = scores.shape[1] if counts is None else min(max(counts[b], 0), scores.shape[1])
        one = boxes[b, :last], scores[b, :last], None if classes is None else classes[b, :last].tolist(), options
        assert_follows(indices[b].cpu(), selected[b].cpu(), *one)
        if exact:
            expected, _ = soft_nms_by_hand(*one)
            assert indices[b, : len(expected)].tolist() == expected


def degenerate():
    """Pairs of boxes without area, inverted, non-finite, huge and tiny."""
    tiny = [[0, 0, 3 * 2.0**-k, 2.0**-k] for k in (40, 60, 70)]
    boxes = [
        *([5.0, 5, 5, 5], [NAN, 0, 9, 9], [0, 0, NAN, 9], [0, 0, INF, 9], [-INF, -INF, INF, INF]),
        *([9, 9, 3, 3], [9, 3, 3, 9], [0, 0, 9, 9], [0, 0, 9, 8], [-3e38, -3e38, 3e38, 3e38]),
        *([-1e18, -1e18, 1e18, 1e18], [-1e18, -1e18, 1e18, 0.9e18], [1, 1, 2, 2], *tiny),
    ]
    return torch.tensor([box for box in boxes for _ in range(2)])[None]


def tie_with_a_later_tile():
    """The best 128 boxes are pairs of IoU 1/2; their second boxes fall to the score of the others, of lower index."""
    corner = torch.stack([torch.arange(236.0) * 10, torch.zeros(236)], 1)
    first = torch.cat([corner, corner + 8], 1)
    boxes = torch.cat([first[:172], first[172:], first[172:] * torch.tensor([1, 1, 1, 0.5])])
    return {"boxes": boxes[None], "scores": torch.tensor([[0.5] * 172 + [1.0] * 128]), "max_output": 70}


TIED = {"scores": torch.full((1, 300), 0.5), "kind": "disjoint"}
CROWD = {"spread": 10.0, "score_threshold": 1e-6, "max_output": 60}  # scores soon fall below most first scores
TILES = {"n": 300, "max_tile": 128, "min_window": 16}
# By name: arguments of `check_soft_nms`. Tiles of 128 boxes and windows of 16 make further ones take part.
_CASES = {
    "boxes": {},
    "float64": {"dtype": torch.float64},
    "float16": {"dtype": torch.float16, "exact": False},
    "bfloat16": {"dtype": torch.bfloat16, "exact": False},
    "int64 classes, counts": {"classes": torch.int64, "counts": [75, 64], "segments": 2},
    "float classes, negative count": {"classes": torch.float32, "counts": [-4]},
    "several warps": {"n": 300},
    "ties": {**TIED, "max_output": 95},
    "one spot": {"kind": "stacked", "score_threshold": 1e-30},
    "output longer": {"n": 30, "max_output": 200},
    "one box": {"n": 1},
    "degenerate": {"boxes": degenerate(), "max_output": 32, "score_threshold": 0.0},
    "score threshold 0": {**CROWD, "score_threshold": 0.0, "iou_threshold": 0.0, "max_output": 90},
    "sorted": {**TILES},
    "sorted, later tiles": {**TILES, **CROWD},
    "sorted, float64": {**TILES, **CROWD, "dtype": torch.float64},
    "sorted, by class": {**TILES, **CROWD, "classes": torch.int64, "counts": [290, 135], "segments": 2},
    "sorted, tie with a later tile": {**TILES, **tie_with_a_later_tile()},
    "sorted, ties": {**TILES, **TIED, "max_output": 140},
}
VARIANTS = {
    f"{case}, {method}": partial(check_soft_nms, method=method, **arguments)
    for case, arguments in _CASES.items()
    for method in METHODS
}
