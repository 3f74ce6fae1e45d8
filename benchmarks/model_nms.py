"""The static model of NMS: what its kernels do with the inputs of `harness/workloads.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.harness.operators import Fence, Launch, ModelTarget, Work
from benchmarks.harness.workloads import CLASSES, candidates, detections

RPN_THRESHOLD, CLASS_THRESHOLD = 0.7, 0.5  # of the benchmarks
SECTOR = 32
WORD = 32  # boxes


@dataclass(frozen=True)
class Scan:
    """A greedy scan of sorted boxes, block by block."""

    kept: list[int]  # boxes kept after each block
    rounds: list[int]  # of each block, until its fixed point shows that nothing changes

    @property
    def blocks(self) -> int:
        return len(self.kept)

    def mean_rounds(self, first: int, last: int) -> float:
        """Rounds of a block, in the mean over blocks first .. last - 1."""
        return sum(self.rounds[first:last]) / (last - first)


def scan(boxes: Tensor, classes: Tensor | None, threshold: float, size: int, most: int) -> Scan:
    """Scan `[N, 4]` boxes, sorted by score, in blocks of `size`, until `most` are kept."""
    if classes is not None:  # boxes of different classes never overlap
        boxes = boxes + (classes * 10_000)[:, None]
    kept, count, rounds = boxes[:0], [], []
    earlier = torch.ones(size, size, dtype=torch.bool).triu(1)
    for block in boxes.split(size):
        candidate = ~(box_iou(kept, block) > threshold).any(0)
        hit = (box_iou(block, block) > threshold) & earlier[: len(block), : len(block)]
        stays, previous, steps = candidate, ~candidate, 0
        while not torch.equal(stays, previous):
            previous, steps = stays, steps + 1
            stays = candidate & ~hit[stays].any(0)
        kept = torch.cat([kept, block[stays]])
        count.append(min(len(kept), most))
        rounds.append(steps)
        if len(kept) >= most:
            break
    return Scan(count, rounds)


def _lists(launch: Launch) -> list[Scan]:
    """The proposals of each level of an RPN, or one list, in blocks of a word of 32 boxes."""
    a = launch.arguments
    return _scans(len(a["boxes"]), a["num_boxes"], a["classes"] is not None)


@lru_cache
def _scans(segments: int, size: int, by_class: bool) -> list[Scan]:
    scans = []
    for seed in range(segments):
        boxes, scores = candidates(size, seed=seed)
        order = scores.argsort(descending=True)
        classes = (torch.arange(size) % CLASSES)[order] if by_class else None
        scans.append(scan(boxes[order], classes, CLASS_THRESHOLD if by_class else RPN_THRESHOLD, WORD, size))
    return scans


def _box_bytes(launch: Launch) -> int:
    """Of the sorted boxes, with their classes."""
    a = launch.arguments
    return 4 * a["boxes"].itemsize + (0 if a["classes"] is None else a["classes"].itemsize)


@lru_cache
def _classes(block: int, most: int) -> Scan:
    boxes, scores, classes = detections()
    order = scores.topk(4096).indices
    return scan(boxes[order], classes[order], CLASS_THRESHOLD, block, most)


def _chunk(launch: Launch) -> tuple[int, int]:
    """Segments, and the boxes of the launch's chunk."""
    a = launch.arguments
    return len(a["boxes"]), min(a["CHUNK"], a["num_boxes"] - a["first"])


def _rank(launch: Launch) -> Work:
    a = launch.arguments
    (segments, size), score = a["scores"].shape, a["scores"].itemsize
    inputs = segments * size * (score + _box_bytes(launch))
    outputs = segments * size * (8 + _box_bytes(launch) + 8)
    return Work(
        hbm_bytes=inputs + outputs,
        l2_bytes=launch.programs * (size * score + a["ROWS"] * (_box_bytes(launch) + SECTOR + 8)) + outputs,
        trips={"first": float(-(-a["num_rows"] // a["COLUMNS"]))},
    )


def _gather(launch: Launch) -> Work:
    a = launch.arguments
    boxes = len(a["boxes"]) * a["num_rows"]
    box = _box_bytes(launch)
    return Work(hbm_bytes=boxes * (8 + 2 * box), l2_bytes=boxes * (8 + max(box, SECTOR) + box + 8))


def _bits(launch: Launch) -> Work:
    """Half of the tiles lie below the diagonal and return at once."""
    a = launch.arguments
    segments, rows = _chunk(launch)
    starts, words = range(0, rows, a["ROWS"]), range(0, rows, WORD)
    tiles = sum(word + WORD - 1 > row for row in starts for word in words)
    moved = a["ROWS"] * (_box_bytes(launch) + 4) + WORD * _box_bytes(launch)
    return Work(
        hbm_bytes=segments * rows * _box_bytes(launch),
        l2_bytes=segments * tiles * moved,
        trips={"j": WORD / a["STEP"]},
        branches={"if (word * 32": tiles / (len(starts) * len(words))},
    )


def _scan_bits(launch: Launch) -> Work:
    a = launch.arguments
    segments, rows = _chunk(launch)
    begin, end = a["first"] // WORD, -(-(a["first"] + rows) // WORD)
    scans = _lists(launch)
    kept = sum(part.kept[end - 1] - (part.kept[begin - 1] if begin else 0) for part in scans)
    rounds = [sum(part.rounds[begin + half : end : 2]) for part in scans for half in (0, 1)]
    blocks = -(-(end - begin) // 2)
    read = segments * rows * (8 + rows / WORD * 4 / 2)
    return Work(
        hbm_bytes=segments * rows * 8 + kept * 8,
        l2_bytes=read + kept * 8,
        trips={
            "begin": float(blocks),
            "_resolve.stays": (sum(rounds[::2]) / segments / blocks, sum(rounds[1::2]) / segments / blocks),
        },
    )


def _suppress_later(launch: Launch) -> Work:
    a = launch.arguments
    following, chunk = a["first"] // WORD, a["CHUNK"] // WORD  # `first` is that of the next chunk
    (part,) = _lists(launch)
    kept = part.kept[following - 1] - (part.kept[following - 1 - chunk] if following > chunk else 0)
    box = _box_bytes(launch)
    boxes = launch.programs * a["ROWS"] * (1 + box)
    return Work(
        hbm_bytes=boxes + kept * box,
        l2_bytes=boxes + launch.programs * kept * box,
        trips={"suppressed_by_kept.first": float(-(-kept // a["STEP"]))},
    )


def _scan_boxes(launch: Launch) -> Work:
    a = launch.arguments
    part = _classes(a["BLOCK"], a["max_output"])
    before = [0, *part.kept[:-1]]
    steps = [-(-count // a["STEP"]) for count in before]
    read = part.blocks * a["BLOCK"] * (8 + 16 + 8) + sum(before) * (8 + 16 + 8)
    return Work(
        hbm_bytes=part.blocks * a["BLOCK"] * (8 + 16 + 8) + 8 * part.kept[-1],
        l2_bytes=read,
        trips={
            "first": (float(part.blocks), -(-(a["max_output"] - part.kept[-1]) // a["BLOCK"])),  # blocks, padding
            "suppressed_by_kept.first": sum(steps) / part.blocks,
            "changed": part.mean_rounds(0, part.blocks),
        },
    )


MODELS = {
    "gather_boxes_kernel": _gather,
    "rank_boxes_kernel": _rank,
    "scan_bits_kernel": _scan_bits,
    "scan_boxes_kernel": _scan_boxes,
    "suppress_later_kernel": _suppress_later,
    "suppression_bits_kernel": _bits,
}
SORTED = ("suppression_bits_kernel", "scan_bits_kernel")  # from the sorted order on
TARGETS = (
    ModelTarget("NMS of 5x1000", SORTED, 25),
    ModelTarget("NMS of 5x2000", SORTED, 40),
    ModelTarget("NMS of 5x1000", ("rank_boxes_kernel",), 8),
    ModelTarget("NMS of 5x2000", ("rank_boxes_kernel",), 16),
)
# A block reads the boxes that earlier blocks kept, which other threads stored.
FENCES = (Fence("scan_boxes_kernel", store="tl.store(boxes + index * 4", load="tl.load(box"),)
