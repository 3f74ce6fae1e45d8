"""The static model of NMS: what its kernels do with the inputs of `harness/workloads.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.harness.operators import Fence, Launch, ModelTarget, Work
from benchmarks.harness.workloads import candidates, detections
from fastmask.kernels.nms.bit_matrix import MAX_CHUNK_ROWS

RPN_THRESHOLD, CLASS_THRESHOLD = 0.7, 0.5  # of the benchmarks
SECTOR = 32


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


@lru_cache
def _lists(segments: int, size: int) -> list[Scan]:
    """The proposals of each level of an RPN, or one list."""
    scans = []
    for seed in range(segments):
        boxes, scores = candidates(size, seed=seed)
        scans.append(scan(boxes[scores.argsort(descending=True)], None, RPN_THRESHOLD, 64, size))
    return scans


@lru_cache
def _classes(block: int, most: int) -> Scan:
    boxes, scores, classes = detections()
    order = scores.topk(4096).indices
    return scan(boxes[order], classes[order], CLASS_THRESHOLD, block, most)


def _chunk(launch: Launch) -> tuple[int, int, int]:
    """Segments, the boxes of one, and the boxes of the launch's chunk."""
    a = launch.arguments
    segments, size = a["order"].shape
    return segments, size, min(64 * a["WORDS"], size - a["first"])


def _bits(launch: Launch) -> Work:
    """Half of the tiles lie below the diagonal and return at once."""
    a = launch.arguments
    segments, _, rows = _chunk(launch)
    tiles = [(row, word) for row in range(0, rows, a["ROWS"]) for word in range(0, rows, 64) if word + 64 > row]
    columns = [min(64, rows - word) for _, word in tiles]
    all_tiles = -(-rows // a["ROWS"]) * -(-rows // 64)
    read = len(tiles) * (a["ROWS"] + 64) * (8 + 16)
    return Work(
        hbm_bytes=segments * rows * (8 + 16),
        l2_bytes=segments * (read + len(tiles) * a["ROWS"] * SECTOR),  # a word of each row lies in a sector of its own
        trips={"j": sum(columns) / len(columns)},
        branches={"if (word * 64": len(tiles) / all_tiles},
    )


def _scan_bits(launch: Launch) -> Work:
    a = launch.arguments
    segments, size, rows = _chunk(launch)
    begin, end = a["first"] // 64, -(-(a["first"] + rows) // 64)
    scans = _lists(segments, size)
    kept = sum(part.kept[end - 1] - (part.kept[begin - 1] if begin else 0) for part in scans)
    read = segments * rows * (SECTOR + 8) + kept * 8 * a["WORDS"]
    return Work(
        hbm_bytes=segments * rows * 8 + kept * 8,
        l2_bytes=read + kept * 8,
        trips={
            "block": float(end - begin),
            "stays": sum(part.mean_rounds(begin, end) for part in scans) / segments,
        },
        branches={"if first > 0": float(a["first"] > 0)},
    )


def _suppress_later(launch: Launch) -> Work:
    a = launch.arguments
    segments, size = a["order"].shape
    following = a["first"] // 64  # blocks scanned so far; `first` is that of the next chunk
    chunk = MAX_CHUNK_ROWS // 64
    (part,) = _lists(segments, size)
    begin, end = part.kept[following - 1 - chunk] if following > chunk else 0, part.kept[following - 1]
    kept = end - begin
    boxes = launch.programs * a["ROWS"] * (1 + 8 + 16)
    return Work(
        hbm_bytes=boxes + kept * (8 + 16),
        l2_bytes=boxes + launch.programs * kept * (8 + 16),
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
            "first": float(part.blocks),
            "suppressed_by_kept.first": sum(steps) / part.blocks,
            "changed": part.mean_rounds(0, part.blocks),
        },
    )


MODELS = {
    "scan_bits_kernel": _scan_bits,
    "scan_boxes_kernel": _scan_boxes,
    "suppress_later_kernel": _suppress_later,
    "suppression_bits_kernel": _bits,
}
BIT_MATRIX = ("scan_bits_kernel", "suppression_bits_kernel")
TARGETS = (ModelTarget("NMS of 5x1000", BIT_MATRIX, 52), ModelTarget("NMS of 5x2000", BIT_MATRIX, 80))
# A block reads the boxes that earlier blocks kept: other threads stored their indices.
FENCES = (Fence("scan_boxes_kernel", store="indices + place", load="kept + position"),)
