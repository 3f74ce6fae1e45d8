"""The static model of the run-length encoder: what its kernels do with smooth masks in `harness/workloads.py`'s boxes.

A launch does not say whose words it reads. In the case of bitmaps the figures of all kernels but the first are those of
boxes too, although bitmaps have 14 times as many words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

import fastmask
from benchmarks.harness.operators import Launch, ModelTarget, Work
from benchmarks.harness.workloads import objects
from fastmask.kernels._mask_sampling import place_masks
from tests.oracles.encode_rle import smooth_masks

CASES = ("RLE of 100 masks 28x28, aligned", "RLE of 100 masks 28x28, torchvision")
KERNELS = ("pack_masks_kernel", "store_ends_kernel", "store_characters_kernel", "join_strings_kernel")
SIDE, IMAGE, MASKS = 28, (800, 1333), 100
SECTOR = 32


class Encoded(NamedTuple):
    """The benchmark's masks: of each, the region of its words and its runs."""

    columns: list[int]
    rows: list[int]
    words: list[int]  # of a column
    changes: list[list[int]]  # of each word of the region, column by column
    runs: list[int]
    characters: list[int]


@lru_cache
def _encoded(convention: str) -> Encoded:
    boxes, masks = objects(MASKS, image=IMAGE), smooth_masks(MASKS, SIDE)
    placement = place_masks(boxes, SIDE, torch.float32, *IMAGE, convention)
    left, top = placement.first.unbind(1)
    right, bottom = placement.last.unbind(1)
    first_word, last_word = top // 32, (bottom + 31) // 32
    pasted = fastmask.paste_masks(masks, boxes, IMAGE, convention=convention)
    above = torch.nn.functional.pad(pasted, (0, 0, 1, 0))[:, :-1]
    changes = (pasted != above).unflatten(1, (-1, 32)).sum(2)  # [N, words, W]
    texts = [rle["counts"] for rle in fastmask.encode_rle(masks, boxes, IMAGE, convention=convention)]
    bounds = zip(first_word.tolist(), last_word.tolist(), left.tolist(), right.tolist(), strict=True)
    return Encoded(
        (right - left).tolist(),
        (bottom - top).tolist(),
        (last_word - first_word).tolist(),
        [part[a:b, c:d].T.flatten().tolist() for part, (a, b, c, d) in zip(changes, bounds, strict=True)],
        (changes.sum((1, 2)) + 1).tolist(),
        [len(text) for text in texts],
    )


def _convention(launch: Launch) -> str:
    return "torchvision" if launch.arguments["PADDING"] else "aligned"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pack_masks(launch: Launch) -> Work:
    a = launch.arguments
    encoded, per_mask = _encoded(_convention(launch)), a["programs_per_mask"]
    steps, rows, loaded = [], 0.0, 0.0
    for columns, height, words in zip(encoded.columns, encoded.rows, encoded.words, strict=True):
        across = -(-columns // a["COLUMNS"])
        steps += [max(0, -(-(across * words - program) // per_mask)) for program in range(per_mask)]
        rows += across * height
        loaded += across * min(height, SIDE + words)  # rows that reach another mask row, or begin a tile
    busy = [float(count) for count in steps if count]
    tiles = sum(busy)
    words = sum(map(len, encoded.changes))
    return Work(
        hbm_bytes=a["masks"].nbytes + a["boxes"].nbytes + 4 * words,
        l2_bytes=launch.programs * SECTOR + len(busy) * SIDE * SIDE * a["masks"].itemsize + SECTOR * words,
        trips={"tile": _mean(busy), "y": loaded / tiles, "r": rows / loaded},
        branches={
            "if tile == 0": 1 / per_mask,
            "if tile < tiles": len(busy) / len(steps),
        },
        longest={"tile": max(busy), "y": 2.0, "r": 16.0},
    )


def _pack_bitmaps(launch: Launch) -> Work:
    bitmaps, words = launch.arguments["bitmaps"], launch.arguments["words"]
    return Work(
        hbm_bytes=bitmaps.nbytes + words.nbytes,
        l2_bytes=bitmaps.nbytes + SECTOR * words.numel(),
    )


def _ends(launch: Launch) -> Work:
    a = launch.arguments
    changes, size = _encoded("aligned").changes, a["WORDS"]
    blocks = [(i // size, max(part[i : i + size])) for part in changes for i in range(0, len(part), size)]
    number, runs = sum(map(len, changes)), sum(_encoded("aligned").runs)
    return Work(
        hbm_bytes=4 * (number + runs),
        l2_bytes=4 * size * sum(block + 1 for block, _ in blocks) + SECTOR * (runs + launch.programs),
        trips={"earlier": _mean([block for block, _ in blocks]), "_": _mean([most for _, most in blocks])},
        branches={
            "if (begin < total)": len(blocks) / launch.programs,
            "if begin + WORDS >= total": len(changes) / len(blocks),
        },
        longest={"earlier": float(max(blocks)[0]), "_": float(max(most for _, most in blocks))},
    )


def _characters(launch: Launch) -> Work:
    encoded = _encoded("aligned")
    blocks = [-(-count // launch.arguments["RUNS"]) for count in encoded.runs]
    ends, text = 4 * sum(encoded.runs), sum(encoded.characters)
    return Work(
        hbm_bytes=ends + text,
        l2_bytes=4 * ends + SECTOR * text,
        trips={"begin": _mean(blocks), "_": 3.0},
        longest={"begin": float(max(blocks)), "_": 4.0},
    )


def _join(launch: Launch) -> Work:
    a = launch.arguments
    text, strings = sum(_encoded("aligned").characters), a["strings"].nbytes
    return Work(
        hbm_bytes=text + strings,
        l2_bytes=launch.programs * a["lengths"].nbytes + text + strings,
        trips={"first": float(-(-a["num_strings"] // a["STRINGS"]))},
    )


MODELS = {
    "pack_masks_kernel": _pack_masks,
    "pack_bitmaps_kernel": _pack_bitmaps,
    "store_ends_kernel": _ends,
    "store_characters_kernel": _characters,
    "join_strings_kernel": _join,
}
TARGETS = tuple(ModelTarget(case, KERNELS, 36) for case in CASES)
