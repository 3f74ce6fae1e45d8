"""Long lists of windows, which several programs walk: hundreds of boxes on one spot all reach the same few tiles.

A list of more than SEGMENT windows may be split into segments. A program sums each segment, in the precision of the
sums, into a slot of a workspace; the tile's own program then adds its slots in order. How lists are split depends on
their lengths alone, so that the same inputs give the same bits. The workspace has a fixed number of slots: where
segments of SEGMENT windows would need more, all are longer.
"""

from __future__ import annotations

from fastmask.kernels._runtime import float_of, jit, tl
from fastmask.kernels.roi_align.tile_lists import tile_at
from fastmask.kernels.roi_align.windows import sum_windows

# More windows than reach a tile without a crowd: at most 52 with 512 RoIs of COCO's sizes per image. A program walks 64
# in an estimated 25 us.
SEGMENT = 64
MAX_SEGMENTS = 256  # 16.8 MB for 256 channels
TILES_PER_STEP = 1024
PIXELS_PER_STEP = 8  # 16 sums per thread


@jit()
def _counts_from(counts, first, num_tiles, STEP: tl.constexpr):
    tile = first + tl.arange(0, STEP)
    return tile, tl.load(counts + tile, mask=tile < num_tiles, other=0)


@jit()
def _segment_length(counts, num_tiles, segments, SEGMENT: tl.constexpr, STEP: tl.constexpr):
    """Windows per segment, so that all lists together have at most `segments` of them; 0 if no list is long.

    A list of c > length windows has ceil(c / length) <= 2 * c / length segments.
    """
    windows = tl.zeros((STEP,), tl.int32)
    for first in range(0, num_tiles, STEP):
        _, count = _counts_from(counts, first, num_tiles, STEP)
        windows += tl.where(count > SEGMENT, count, 0)
    in_long_lists = tl.sum(windows, 0)
    return tl.where(in_long_lists > 0, tl.maximum(tl.cdiv(2 * in_long_lists, segments), SEGMENT), 0)


@jit()
def _find_segment(segment, counts, num_tiles, length, STEP: tl.constexpr):
    """The tile of a segment, its number in the tile, and its number of windows: 0 if there is no such segment."""
    found, number, windows, before = 0, 0, 0, 0
    for first in range(0, num_tiles, STEP):
        tile, count = _counts_from(counts, first, num_tiles, STEP)
        segments = tl.where(count > length, tl.cdiv(count, length), 0)
        start = before + tl.cumsum(segments, 0) - segments
        here = (start <= segment) & (segment < start + segments)  # of one tile at most
        found += tl.sum(tl.where(here, tile, 0), 0)
        number += tl.sum(tl.where(here, segment - start, 0), 0)
        windows += tl.sum(tl.where(here, tl.minimum(count - (segment - start) * length, length), 0), 0)
        before += tl.sum(segments, 0)
    return found, number, windows


@jit(do_not_specialize=["num_tiles", "num_images", "first_tile"])
def segment_sums_kernel(
    grad,  # [K, PH, PW, C]
    boxes,  # [K, 5] of COMPUTE
    argmax,  # [K, PH, PW, C] int32; read for the maximum only
    windows,
    starts,  # [tiles] int64
    counts,  # [tiles] int32
    workspace,  # [segments, TILE * TILE, C] of COMPUTE
    slots,  # [tiles] int32: the first slot of each split list
    length,  # [1] int32: windows per segment
    num_tiles,
    first_tile,
    sizes,  # L packed (H_l, W_l)
    num_images,
    scales,  # L float64 bits
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    REDUCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum the windows of each segment. Where no list is long, every program ends after one look at the counts."""
    slot = tl.program_id(0)
    in_segment = _segment_length(counts, num_tiles, tl.num_programs(0), SEGMENT, STEP)
    if in_segment > 0:
        found, number, count = _find_segment(slot, counts, num_tiles, in_segment, STEP)
        if (slot == 0) & (tl.program_id(1) == 0):
            tl.store(length, in_segment)
        if count > 0:
            if (number == 0) & (tl.program_id(1) == 0):
                tl.store(slots + found, slot)
            tile = tile_at(first_tile + found, sizes, num_images, TILE)
            scale = scales[0]
            for index in tl.static_range(1, len(sizes)):
                if tile.level == index:
                    scale = scales[index]
            channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
            total = sum_windows(
                grad,
                boxes,
                argmax,
                windows + tl.load(starts + found) + number * in_segment,
                count,
                tile,
                float_of(scale, COMPUTE),
                channel,
                C,
                PH,
                PW,
                RATIO,
                ALIGNED,
                REDUCTION,
                COMPUTE,
                TILE,
                WINDOW,
                CHANNELS,
                PRODUCT,
                PRECISION,
            )
            place = (slot * (TILE * TILE) + tl.arange(0, TILE * TILE)).to(tl.int64)[:, None] * C + channel[None, :]
            if C % CHANNELS == 0:
                tl.store(workspace + place, total)
            else:
                tl.store(workspace + place, total, mask=(channel < C)[None, :])


@jit()
def sum_of_segments(
    workspace,
    slot,
    segments,
    pixel,
    channel,
    C: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The sum `[pixels, channels]` of a split list's segments, in order, at pixels of its tile."""
    total = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    for index in tl.range(segments, loop_unroll_factor=4):
        place = ((slot + index) * (TILE * TILE) + pixel).to(tl.int64)[:, None] * C + channel[None, :]
        if C % CHANNELS == 0:
            total += tl.load(workspace + place)
        else:
            total += tl.load(workspace + place, mask=(channel < C)[None, :], other=0.0)
    return total
