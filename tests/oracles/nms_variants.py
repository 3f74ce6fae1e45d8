"""Small calls of every variant of the NMS kernels, index for index against a greedy loop and torchvision."""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torchvision

import fastmask
from fastmask.kernels.nms import bit_matrix, forward, rank
from tests.oracles.nms import assert_same_indices, draw_candidates, greedy_nms_padded

NAN, INF = float("nan"), float("inf")


def _check(
    device,
    *,
    scan,
    n=90,
    segments=1,
    max_output=None,
    chunk=4096,
    dtype=torch.float32,
    kind="random",
    boxes=None,
    levels=None,
    threshold=0.4,
    classes=None,
    counts=None,
    score_threshold=None,
    max_ranked=rank.MAX_RANKED,
):
    """A padded call by one of the two algorithms: `scan`, or the bit matrix in chunks of `chunk` boxes."""
    drawn = [draw_candidates(n, seed, kind=kind) for seed in range(segments)]
    boxes = torch.stack([box for box, _ in drawn]) if boxes is None else boxes.expand(segments, -1, -1)
    scores = torch.stack([score[: boxes.shape[1]] for _, score in drawn])
    if levels is not None:
        scores = (scores * levels).floor() / levels
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    max_output = boxes.shape[1] if max_output is None else max_output
    if isinstance(classes, torch.dtype):
        classes = (torch.arange(scores.numel()).view(scores.shape) * 7 % 5 % 3).to(classes)
    counts = None if counts is None else torch.tensor(counts)
    expected = greedy_nms_padded(boxes, scores, threshold, max_output, classes, counts, score_threshold)
    with (
        patch.object(forward, "MAX_SINGLE_LAUNCH_OUTPUT", 1 << 30 if scan else -1),
        patch.object(bit_matrix, "MAX_CHUNK_ROWS", chunk),
        patch.object(rank, "MAX_RANKED", max_ranked),
    ):
        actual = fastmask.nms_padded(
            boxes.to(device),
            scores.to(device),
            threshold,
            max_output,
            classes=None if classes is None else classes.to(device),
            counts=None if counts is None else counts.to(device),
            score_threshold=score_threshold,
        )
    assert_same_indices(actual, expected)


def _check_torchvision(device, *, scan, by_class=False):
    """The functions with torchvision's names."""
    boxes, scores = draw_candidates(90, 3)
    classes = torch.arange(90) % 3 if by_class else torch.zeros(90, dtype=torch.int64)
    expected = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, classes, 0.4)
    boxes, scores, classes = boxes.to(device), scores.to(device), classes.to(device)
    with patch.object(forward, "MAX_SINGLE_LAUNCH_OUTPUT", 1 << 30 if scan else -1):
        actual = fastmask.batched_nms(boxes, scores, classes, 0.4) if by_class else fastmask.nms(boxes, scores, 0.4)
    assert torch.equal(actual.cpu(), expected)


def _degenerate() -> torch.Tensor:
    """Pairs of boxes without area, inverted, non-finite, huge and tiny; areas of subnormal numbers."""
    tiny = [torch.tensor([0.0, 0, 3, 3]) * 2.0**-k for k in (40, 60, 70, 73, 74)]
    return torch.stack(
        [
            torch.tensor(box, dtype=torch.float32)
            for box in (
                [5.0, 5, 5, 5],
                [NAN, 0, 9, 9],
                [0, 0, NAN, 9],
                [0, 0, INF, 9],
                [-INF, -INF, INF, INF],
                [9, 9, 3, 3],
                [9, 3, 3, 9],
                [0, 0, 9, 9],
                [0, 0, 9, 8],
                [-3e38, -3e38, 3e38, 3e38],
                [-1e19, -1e19, 1e19, 1e19],
                [-1e19, -1e19, 1e19, 0.9e19],
                [1, 1, 2, 2],
                *(box.tolist() for box in tiny),
                *((box * torch.tensor([1, 1, 1, 2 / 3])).tolist() for box in tiny),
            )
            for _ in range(2)
        ]
    )[None]


def _near_threshold(threshold: float) -> dict[str, torch.Tensor]:
    """Pairs, each of a class of its own, whose IoU is the threshold but for a few units in the last place.

    Areas range over all exponents of float32, subnormal ones included.
    """
    exponent = torch.linspace(-147, 126, 45).int()
    mantissa = 1 + torch.rand(45, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    larger = torch.ldexp(mantissa, exponent).float()
    smaller = (larger.double() * threshold).float()
    smaller = (smaller.view(torch.int32) + torch.arange(45, dtype=torch.int32) % 7 - 3).clamp(min=0).view(torch.float32)
    zero, one = torch.zeros(45), torch.ones(45)
    pairs = [torch.stack([zero, zero, one, height], 1) for height in (larger, smaller)]
    classes = torch.arange(45)
    return {"boxes": torch.cat(pairs)[None], "classes": torch.cat([classes, classes])[None]}


_ALGORITHMS = {"scan": {"scan": True}, "bits": {"scan": False}, "chunks": {"scan": False, "chunk": 64, "max_ranked": 0}}
_CASES = {
    "boxes": {},
    "float64": {"dtype": torch.float64},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "int64 classes, counts": {"classes": torch.int64, "counts": [75, 64], "segments": 2},
    "float classes, counts, scores": {"classes": torch.float32, "counts": [77], "score_threshold": 0.3},
    "negative count": {"counts": [-4]},
    "tied scores": {"levels": 4},
    "one spot": {"kind": "stacked"},
    "none overlaps": {"kind": "disjoint"},
    "output filled": {"kind": "disjoint", "n": 130, "max_output": 70},
    "output longer": {"n": 70, "max_output": 200},
    "one box": {"n": 1},
    "degenerate": {"boxes": _degenerate(), "n": 46, "threshold": 0.5},
    **{f"IoUs near {t:.3g}": {"threshold": t, **_near_threshold(t)} for t in (0.7, 0.5, 1 / 3, 1.0)},
    "threshold 0": {"threshold": 0.0},
    "threshold 1": {"threshold": 1.0, "kind": "clustered"},
}
VARIANTS: dict[str, Callable[[str], None]] = {
    f"{case}, {algorithm}": partial(_check, **arguments | options)
    for case, options in _CASES.items()
    for algorithm, arguments in _ALGORITHMS.items()
}
VARIANTS |= {
    "sorted, scan": partial(_check, scan=True, max_ranked=0),
    "sorted, counts, bits": partial(_check, scan=False, max_ranked=0, counts=[75]),
    "several warps, bits": partial(_check, scan=False, n=1030, kind="stacked", chunk=2048),
    "nms, scan": partial(_check_torchvision, scan=True),
    "nms, bits": partial(_check_torchvision, scan=False),
    "batched_nms, scan": partial(_check_torchvision, scan=True, by_class=True),
    "batched_nms, bits": partial(_check_torchvision, scan=False, by_class=True),
}
