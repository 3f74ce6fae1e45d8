"""The tiles of a pyramid, and the windows of bins that reach each of them.

The backward sums over bins for every pixel. Its programs own tiles of TILE x TILE pixels; tiles are numbered from the
coarsest level to the finest, because many more boxes reach a tile of a coarse level and its program should start early.
A *window* is a block of WINDOW x WINDOW bins of one box: few bins of a large box reach a tile, and the tile's program
walks the windows that cover those. A window is stored as the number of its first bin, (k * PH + p) * PW + q, which is
also the row of its gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastmask.kernels._runtime import divide_by_constant, float_of, jit, tl
from fastmask.kernels.roi_align.geometry import finite_box, scaled_box, size_of

TILE = 8
WINDOW = 4
# One warp lists the windows of a tile, 2 boxes per thread. About 2 of the 260 boxes on P2 of an image reach a tile; a
# step without any takes a quarter of the instructions. sm_90: 54 registers; 128 boxes per step need 89 registers and
# 2.3 times the instructions. Not yet measured on a GPU.
BOXES_PER_STEP = 64
LIST_WARPS = 1


class Tile(NamedTuple):
    """A tile, as kernels hold it."""

    level: Any
    image: Any
    row: Any  # of its first pixel
    column: Any
    height: Any  # of its level
    width: Any
    first: Any  # the number of the first tile of its image and level


@jit()
def tile_at(tile, sizes, num_images, TILE: tl.constexpr):
    """The `Tile` of a number."""
    LAST: tl.constexpr = len(sizes) - 1
    level, packed, start, end = LAST, sizes[LAST], 0, 0
    for index in tl.static_range(LAST):
        height, width = size_of(sizes[LAST - index])
        next_start = end + tl.cdiv(height, TILE) * tl.cdiv(width, TILE) * num_images
        if tile >= next_start:
            level, packed, start = LAST - index - 1, sizes[LAST - index - 1], next_start
        end = next_start
    height, width = size_of(packed)
    rows, columns = tl.cdiv(height, TILE), tl.cdiv(width, TILE)
    image = (tile - start) // (rows * columns)
    start += image * rows * columns
    row = (tile - start) // columns
    column = tile - start - row * columns
    return Tile(level, image, row * TILE, column * TILE, height, width, start)


@jit()
def _extent_of(start, end, first, ALIGNED: tl.constexpr):
    """Size of boxes along an axis, and a slack in pixels: more than rounding moves samples and the quotients below."""
    size = end - start
    if not ALIGNED:
        size = tl.maximum(size, 1.0)
    return size, 1.0 / 64 + (tl.abs(start) + tl.abs(size) + first) * (1.0 / (1 << 18))


@jit()
def _reaches(start, end, first, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """Whether samples of boxes can touch pixels first .. first + TILE - 1."""
    size, slack = _extent_of(start, end, first, ALIGNED)
    low, high = tl.minimum(start, start + size) - slack, tl.maximum(start, start + size) + slack
    return (low <= first + TILE) & (high >= first - 1)


@jit()
def bins_reaching(
    start, end, first, BINS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    """A range of bins: no others have samples that touch pixels first .. first + TILE - 1.

    The samples of bin p are at start + (p + h) * bin or later, and at start + (p + 1 - h) * bin or earlier, where h is
    half a sample's share of the bin. A sample within a pixel of the tile touches it. Boxes whose bins are too small or
    too large for the quotients have all bins.
    """
    size, slack = _extent_of(start, end, first, ALIGNED)
    bin = divide_by_constant(size, BINS)
    regular = (bin > 1e-6) & (bin < 1e9)
    inverse = 1.0 / tl.where(regular, bin, 1.0)
    HALF: tl.constexpr = 0.5 / RATIO if RATIO > 0 else 0.0
    low = tl.floor((first - 1 - slack - start) * inverse - (1 - HALF)) + 1
    high = tl.ceil((first + TILE + slack - start) * inverse - HALF)
    low = tl.minimum(tl.maximum(low, 0.0), BINS).to(tl.int32)
    high = tl.minimum(tl.maximum(high, 0.0), BINS).to(tl.int32)
    return tl.where(regular, low, 0), tl.where(regular, high, BINS)


@jit(do_not_specialize=["num_boxes", "num_images", "first_tile", "max_tiles"])
def list_windows_kernel(
    boxes,  # [K, 5]
    by_level,  # [N * L, K] int32 and
    level_counts,  # [N * L] int32, from `list_boxes_by_level`
    windows,  # int32 or int64
    starts,  # [tiles] int64: where each tile's windows are
    counts,  # [tiles] int32: and how many
    num_boxes,
    first_tile,
    max_tiles,  # the most tiles of one image and level in this launch
    sizes,  # L packed (H_l, W_l)
    num_images,
    scales,  # L float64 bits
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    STEP: tl.constexpr,
):
    """Of each tile, the windows of its boxes in order.

    Tiles of one image and level have room for all windows of its boxes, so that all lists need max_tiles * K * windows
    per box, whatever level the boxes are on.
    """
    number = first_tile + tl.program_id(0)
    tile = tile_at(number, sizes, num_images, TILE)
    scale = scales[0]
    for index in tl.static_range(1, len(sizes)):
        if tile.level == index:
            scale = scales[index]
    scale = float_of(scale, COMPUTE)

    row = tile.image * len(sizes) + tile.level
    before = tl.zeros((STEP,), tl.int32)
    for first in range(0, row, STEP):
        other = first + tl.arange(0, STEP)
        before += tl.load(level_counts + other, mask=other < row, other=0)
    num_listed = tl.load(level_counts + row)
    PER_BOX: tl.constexpr = ((PH + WINDOW - 1) // WINDOW) * ((PW + WINDOW - 1) // WINDOW)
    in_launch = (number - tl.maximum(tile.first, first_tile)).to(tl.int64)
    start = (tl.sum(before, 0).to(tl.int64) * max_tiles + in_launch * num_listed) * PER_BOX
    windows += start
    by_level += row.to(tl.int64) * num_boxes

    count = 0
    for at in range(0, num_listed, STEP):
        entry = at + tl.arange(0, STEP)
        k = tl.load(by_level + entry, mask=entry < num_listed, other=0)
        x1, y1, x2, y2 = scaled_box(boxes + k.to(tl.int64) * 5, scale, ALIGNED)
        hit = (entry < num_listed) & finite_box(x1, y1, x2, y2)
        hit &= _reaches(y1, y2, tile.row, ALIGNED, TILE) & _reaches(x1, x2, tile.column, ALIGNED, TILE)
        if tl.max(hit.to(tl.int32), 0) > 0:
            p, end_p = bins_reaching(y1, y2, tile.row, PH, RATIO, ALIGNED, TILE)
            q, end_q = bins_reaching(x1, x2, tile.column, PW, RATIO, ALIGNED, TILE)
            down = tl.where(hit, tl.cdiv(tl.maximum(end_p - p, 0), WINDOW), 0)
            across = tl.where(hit, tl.cdiv(tl.maximum(end_q - q, 0), WINDOW), 0)
            place = count + tl.cumsum(down * across, 0) - down * across
            bin = (k.to(windows.dtype.element_ty) * PH + p) * PW + q
            for i in range(tl.max(down, 0)):
                for j in range(tl.max(across, 0)):
                    window = bin + (i * PW + j) * WINDOW
                    tl.store(windows + place + i * across + j, window, mask=(i < down) & (j < across))
            count += tl.sum(down * across, 0)
    tl.store(starts + tl.program_id(0), start)
    tl.store(counts + tl.program_id(0), count)
