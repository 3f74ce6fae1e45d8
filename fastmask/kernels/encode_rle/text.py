"""COCO's compressed strings, of all masks at once, in plain PyTorch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def encode_ends(ends: Tensor, num_masks: int, pixels: int) -> tuple[Tensor, Tensor]:
    """The strings of masks whose runs end at given positions.

    Args:
        ends: `[K]` int64, rising: `n * (pixels + 1) + p` where a run of mask n ends before position p. The end of the
            last run, at `pixels`, may be there or not.
        num_masks: N.
        pixels: of a mask.

    Returns:
        `[total]` uint8, the strings one after the other, and `[N]` int64, their lengths.
    """
    mask = ends // (pixels + 1)
    position = ends - mask * (pixels + 1)
    if not (inner := position < pixels).all():
        mask, position = mask[inner], position[inner]
    count = mask.bincount(minlength=num_masks) + 1  # runs of each mask, with the last one
    last = count.cumsum(0) - 1
    ends = position.new_full((len(position) + num_masks,), pixels)
    ends[torch.arange(len(position), device=mask.device) + mask] = position
    first = last - count + 1
    runs = ends.clone()
    runs[1:] -= ends[:-1]
    runs[first] = ends[first]
    delta = runs.clone()
    delta[2:] -= runs[:-2]
    for i in range(3):  # the first three of a mask are stored as they are
        index = (first + i)[count > i]
        delta[index] = runs[index]
    return _digits(delta, last)


def _digits(numbers: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Each number in groups of 5 bits, lowest first, as many as hold it and its sign; bit 5: another group follows.

    Args:
        numbers: `[K]` int64, of less than 31 bits and the sign.
        last: `[N]` the index of the last number of each mask.

    Returns:
        The characters of all numbers, and how many each mask has.
    """
    numbers = numbers.int()
    magnitude = numbers ^ (numbers >> 31)  # -1 needs as many groups as 0
    groups, bits = torch.ones_like(numbers), 4
    largest = int(magnitude.max()) if len(numbers) else 0
    while largest >> bits:
        groups += magnitude >> bits != 0
        bits += 5
    place = groups.cumsum(0)
    lengths = place[last]
    strings = torch.empty(int(lengths[-1]) if len(lengths) else 0, dtype=torch.uint8, device=numbers.device)
    place -= groups
    while len(numbers):  # the lowest group of those that have one
        more = groups > 1
        strings[place] = ((numbers & 31) + 48 + 32 * more).to(torch.uint8)
        index = more.nonzero()[:, 0]
        numbers, groups, place = numbers[index] >> 5, groups[index] - 1, place[index] + 1
    lengths[1:] -= lengths[:-1].clone()
    return strings, lengths


def split_text(strings: Tensor, lengths: Tensor) -> list[str]:
    """Strings on the CPU as Python's."""
    text = ctypes.string_at(strings.data_ptr(), len(strings)).decode("ascii") if len(strings) else ""
    result, begin = [], 0
    for length in lengths.tolist():
        result.append(text[begin : begin + length])
        begin += length
    return result
