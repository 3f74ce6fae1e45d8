"""Launchers of the encoder: words of bits, strings of single masks, and all strings one after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import ceil_div, float64_bits, on_device_of, triton_dtype
from fastmask.kernels._validation import MAX_INT32
from fastmask.kernels.encode_rle.columns import pack_bitmaps_kernel, pack_masks_kernel
from fastmask.kernels.encode_rle.reference import RLESpec
from fastmask.kernels.encode_rle.strings import join_strings_kernel, store_characters_kernel, store_ends_kernel

CAPACITY = 8192  # bytes of a string; longer ones take a second pass
HOST_BYTES = 2000  # that are copied to the host for each mask at once, its length included; the rest, if any, after it

# By the static model of 100 smooth masks at 800 x 1333 on an H200; not yet measured on a GPU.
# Tiles of a word for each of 64 columns, two for each thread of a warp: 30 instructions per row. With 32 columns 24 per
# row, but 1.6 times the issue time. 3 tiles per program take 10.2 us, 6 take 14.5.
COLUMNS = 64
TILES_PER_PROGRAM = 3
BITMAP_COLUMNS = 128
# One word per thread: its loads are not serialised. 11.5 us, 36 registers; 4 words per thread take 19.9, 8 take 43.8.
END_WARPS, END_WORDS = 16, 1024
STRING_WARPS, STRING_RUNS = 8, 512  # 8.4 us; 4 runs per thread need 84 registers
JOINED_BYTES, JOINED_STRINGS = 2048, 128


@lru_cache(maxsize=1024)
def _prepared_pack(spec: RLESpec, m: int, dtype: torch.dtype, num_masks: int) -> tuple[int, Launch]:
    """The number of programs for each mask, and the launch."""
    tiles = ceil_div(spec.width, COLUMNS) * ceil_div(spec.height, 32)  # a box touches at most these
    programs_per_mask = max(1, ceil_div(tiles, TILES_PER_PROGRAM))
    return programs_per_mask, Launch(
        pack_masks_kernel,
        num_masks,
        programs_per_mask,
        spec.height,
        spec.width,
        float64_bits(spec.threshold),
        M=m,
        PADDING=int(spec.convention == "torchvision"),
        COLUMNS=COLUMNS,
        COMPUTE=triton_dtype(dtype),
        num_warps=1,
        enable_fp_fusion=False,
    )


@lru_cache(maxsize=1024)
def _prepared_bitmaps(height: int, width: int, dtype: torch.dtype) -> tuple[int, Launch]:
    """The number of programs for each bitmap, and the launch."""
    programs = max(1, ceil_div(width, BITMAP_COLUMNS) * ceil_div(height, 32))
    boolean = dtype == torch.bool
    return programs, Launch(
        pack_bitmaps_kernel, height, width, BOOLEAN=boolean, COLUMNS=BITMAP_COLUMNS, num_warps=BITMAP_COLUMNS // 32
    )


@lru_cache(maxsize=1024)
def _prepared_strings(capacity: int, height: int, width: int, outside: bool) -> tuple[int, Launch, Launch]:
    """The number of programs for each mask that find where runs end, their launch, and that of the characters."""
    programs = max(1, ceil_div(width * ceil_div(height, 32), END_WORDS))
    numbers = programs, capacity, height, width, int(outside)
    return (
        programs,
        Launch(store_ends_kernel, *numbers, WORDS=END_WORDS, num_warps=END_WARPS),
        Launch(store_characters_kernel, capacity, height * width, RUNS=STRING_RUNS, num_warps=STRING_WARPS),
    )


@lru_cache(maxsize=1024)
def _prepared_join(count: int, capacity: int) -> tuple[int, Launch]:
    """The number of programs for each string, and the launch."""
    programs = ceil_div(capacity, JOINED_BYTES)
    return programs, Launch(
        join_strings_kernel, count, capacity, programs, STRINGS=JOINED_STRINGS, BYTES=JOINED_BYTES, num_warps=4
    )


def _launch_strings(
    words: Tensor, regions: Tensor, height: int, width: int, capacity: int, *, outside: bool
) -> tuple[Tensor, Tensor]:
    """The strings of words of bits, one after the other, and their lengths `[B * N]`."""
    count, device = regions.shape[0], regions.device
    ends = torch.empty((count, capacity), dtype=torch.int32, device=device)
    rows = torch.empty((count, capacity), dtype=torch.uint8, device=device)
    lengths = torch.empty(count, dtype=torch.int64, device=device)
    strings = torch.empty(count * capacity, dtype=torch.uint8, device=device)
    runs = torch.empty(count, dtype=torch.int32, device=device)
    programs, store_ends, store_characters = _prepared_strings(capacity, height, width, outside)
    store_ends((count * programs,), words, regions, ends, runs)
    store_characters((count,), ends, runs, rows, lengths)
    programs, join = _prepared_join(count, capacity)
    join((count * programs,), rows, lengths, strings)
    return strings, lengths


def _empty_words(count: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the words of each mask, and for its region."""
    words = torch.empty((count, width * ceil_div(height, 32)), dtype=torch.int32, device=device)
    return words, torch.empty((count, 4), dtype=torch.int32, device=device)


def launch_encode_rle_padded(
    masks: Tensor, boxes: Tensor, counts: Tensor | None, capacity: int, spec: RLESpec
) -> tuple[Tensor, Tensor]:
    batch, num_masks, m, _ = masks.shape
    count, device = batch * num_masks, masks.device
    if not count:
        return masks.new_empty(0, dtype=torch.uint8), masks.new_empty(batch, num_masks, dtype=torch.int64)
    boxes = boxes if boxes.itemsize >= 4 else boxes.float()
    counts = None if counts is None else counts.contiguous()
    words, regions = _empty_words(count, spec.height, spec.width, device)
    programs, pack = _prepared_pack(spec, m, masks.dtype, num_masks)
    with on_device_of(masks):
        pack((count * programs,), masks.contiguous(), boxes.contiguous(), counts, words, regions)
        outside = spec.threshold <= 0
        strings, lengths = _launch_strings(words, regions, spec.height, spec.width, capacity, outside=outside)
    return strings, lengths.view(batch, num_masks)


def launch_encode_bitmaps_padded(bitmaps: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """As `launch_encode_rle_padded`, of `[N, H, W]` bitmaps."""
    count, height, width = bitmaps.shape
    words, regions = _empty_words(count, height, width, bitmaps.device)
    programs, pack = _prepared_bitmaps(height, width, bitmaps.dtype)
    with on_device_of(bitmaps):
        pack((count * programs,), bitmaps.contiguous().view(torch.uint8), words, regions)
        return _launch_strings(words, regions, height, width, capacity, outside=False)


def launch_encode_rle(masks: Tensor, boxes: Tensor, spec: RLESpec) -> tuple[Tensor, Tensor]:
    def encode(selected: Tensor | None, capacity: int) -> tuple[Tensor, Tensor]:
        some = (masks, boxes) if selected is None else (masks[selected], boxes[selected])
        strings, lengths = launch_encode_rle_padded(some[0][None], some[1][None], None, capacity, spec)
        return strings, lengths[0]

    return _on_host(encode, len(masks), masks.device)


def launch_encode_bitmaps(bitmaps: Tensor) -> tuple[Tensor, Tensor]:
    def encode(selected: Tensor | None, capacity: int) -> tuple[Tensor, Tensor]:
        return launch_encode_bitmaps_padded(bitmaps if selected is None else bitmaps[selected], capacity)

    return _on_host(encode, len(bitmaps), bitmaps.device)


def _on_host(
    encode: Callable[[Tensor | None, int], tuple[Tensor, Tensor]], count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The strings and lengths that the launches `encode(selected masks, capacity)` give, on the host.

    One copy brings them, unless the strings of all are longer than `HOST_BYTES` in the mean. Those that do not fit
    `CAPACITY` are encoded again, with what they need.
    """
    if not count:
        host = torch.empty(0, dtype=torch.uint8, device="cpu")
        return host, torch.empty(0, dtype=torch.int64, device="cpu")
    strings, lengths = encode(None, CAPACITY)
    size = count * lengths.itemsize
    host = torch.cat([lengths.view(torch.uint8), strings[: count * HOST_BYTES - size]]).cpu()
    length = host[:size].view(torch.int64).clone()
    text, too_long = host[size:], length > CAPACITY
    stored = int(length[~too_long].sum())
    if stored > len(text):
        text = strings[:stored].cpu()
    if not too_long.any():
        return text[:stored].clone(), length

    pieces = list(text[:stored].split(length.masked_fill(too_long, 0).tolist()))
    index = too_long.nonzero()[:, 0]
    needed = int(length[index].max())
    for some in index.split(max(1, MAX_INT32 // needed)):
        strings, lengths = encode(some.to(device), needed)
        length[some] = lengths.cpu()
        sizes = length[some].tolist()
        for n, piece in zip(some.tolist(), strings[: sum(sizes)].cpu().split(sizes), strict=True):
            pieces[n] = piece
    return torch.cat(pieces), length
