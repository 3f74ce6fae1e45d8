"""Polygons on accelerators: one program rasterises 32 rows of 8 columns of one target.

A thread owns an edge. It scales the two vertices, and computes where its edge crosses each of the columns. A crossing
at row r is the 32-bit word whose bits r and above are set; the words of all edges of a polygon, joined by exclusive or,
are the columns of its mask, and those of polygons, joined by or, of their union. `polygons.py` has the arithmetic.
Words are exact, so the order of edges does not matter.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import ceil_div, divide, jit, next_power_of_2, on_device_of, tl
from fastmask.kernels.mask_targets.polygons import MAX_COORDINATE, MIN_SIDE, UPSAMPLING
from fastmask.kernels.roi_align.geometry import finite_box
from fastmask.masks import OBJECT_COLUMNS, POLYGONS

BITS = 32  # rows of a word
EDGES = 32  # that a program reads at a time: one for each thread of its warp
# A thread computes the crossings of its edge with all columns of the program. With 8, 16 and 32 columns, 256 RoIs of
# 28 x 28 take 2.4, 3.0 and 4.1 us of latency on an H200, and 0.9, 0.7 and 0.7 us of issue, by the static model; 78, 135
# and 190 registers on sm_90, no spills. Not yet measured on a GPU.
MAX_COLUMNS = 8


@jit()
def object_of(matches, offsets, roi, slots, num_objects):
    """The object of a RoI, and whether it has one. Without `offsets`, matches count the objects of all images."""
    match = tl.load(matches + roi)
    first, count = match * 0, match * 0 + num_objects
    if offsets is not None:
        image = offsets + roi // slots
        first = tl.load(image)
        count = tl.load(image + 1) - first
    valid = (match >= 0) & (match < count)
    return tl.where(valid, first + match, 0), valid


@jit()
def _scaled(coordinate, start, scale, FACTOR: tl.constexpr, LIMIT: tl.constexpr):
    """A vertex in scaled integers along one axis; not a number is moved like what is too far to the left."""
    value = (coordinate.to(tl.float64) - start) * scale * FACTOR + 0.5
    far = tl.where(value > 0, LIMIT, -LIMIT)
    return tl.where(tl.abs(value) <= LIMIT, value, far).to(tl.int32)


@jit()
def _words(x0, y0, x1, y1, columns, first_row, HEIGHT: tl.constexpr, FACTOR: tl.constexpr):
    """For `columns [C, 1]` and edges `[1, E]`: the bits of the rows at and below each crossing, from `first_row` on."""
    boundary = columns * FACTOR + FACTOR // 2
    crosses = (tl.minimum(x0, x1) <= boundary) & (tl.maximum(x0, x1) > boundary)
    flat = tl.abs(x1 - x0) >= tl.abs(y1 - y0)
    # Along the longer axis from a, over `length` steps; along the other from b.
    a0, a1 = tl.where(flat, x0, y0), tl.where(flat, x1, y1)
    b0, b1 = tl.where(flat, y0, x0), tl.where(flat, y1, x1)
    a, b = tl.minimum(a0, a1), tl.where(a0 <= a1, b0, b1)
    length, rise = tl.abs(a1 - a0), tl.where(a0 <= a1, b1, b0) - b
    slope = divide(rise.to(tl.float64), tl.maximum(length, 1).to(tl.float64))
    inverse = divide(length.to(tl.float64), tl.where(rise == 0, 1, rise).to(tl.float64))

    flat_step = (boundary - a + (rise < 0).to(tl.int32)).to(tl.float64)
    steep_step = tl.floor(((boundary - b).to(tl.float64) + 0.5) * inverse + 0.5)
    steep_step = tl.minimum(tl.maximum(steep_step, 0.0), length.to(tl.float64))
    step = tl.where(flat, flat_step, steep_step)
    minor = b.to(tl.float64) + slope * step + 0.5
    before = ((minor < (boundary + 1).to(tl.float64)) == (rise > 0)).to(tl.int32)
    y = tl.where(flat, minor.to(tl.int32), a + step.to(tl.int32) - 1 + before)
    row = tl.minimum((tl.maximum(y, -2) + 2) // FACTOR, HEIGHT)
    row = tl.maximum(row - first_row, 0)
    word = tl.full(row.shape, 0xFFFFFFFF, tl.uint32) << tl.minimum(row, 31).to(tl.uint32)
    return tl.where(crosses & (row < 32), word, 0)


@jit(do_not_specialize=["slots", "num_objects"])
def _polygon_targets_kernel(
    vertices,  # [V, 2], float32 or float64
    parts,  # [P, 2]
    objects,  # [G, 5]
    boxes,  # [K, 4], float32 or float64
    matches,  # [K]
    offsets,  # [B + 1], or None
    out,  # [K, H, W]
    slots,  # of an image
    num_objects,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGES: tl.constexpr,
    FACTOR: tl.constexpr,
    LIMIT: tl.constexpr,
    MIN_SIDE: tl.constexpr,
    POLYGONS: tl.constexpr,
    OBJECT_COLUMNS: tl.constexpr,
):
    roi = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(1) * ROWS
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)

    box = boxes + roi * 4
    x1, y1 = tl.load(box).to(tl.float64), tl.load(box + 1).to(tl.float64)
    x2, y2 = tl.load(box + 2).to(tl.float64), tl.load(box + 3).to(tl.float64)
    index, valid = object_of(matches, offsets, roi, slots, num_objects)
    object = objects + index * OBJECT_COLUMNS
    valid &= finite_box(x1, y1, x2, y2)
    valid &= tl.load(object, mask=valid, other=-1) == POLYGONS
    part = tl.load(object + 1, mask=valid, other=0)
    last_part = part + tl.load(object + 2, mask=valid, other=0)
    min_side = tl.full((), MIN_SIDE, tl.float64)
    scale_x = divide(tl.full((), WIDTH, tl.float64), tl.maximum(x2 - x1, min_side))
    scale_y = divide(tl.full((), HEIGHT, tl.float64), tl.maximum(y2 - y1, min_side))

    union = tl.zeros((COLUMNS,), tl.uint32)
    while part < last_part:
        vertex = vertices + tl.load(parts + part * 2) * 2
        count = tl.load(parts + part * 2 + 1).to(tl.int32)
        words = tl.zeros((COLUMNS,), tl.uint32)
        edge = 0
        while edge < count:
            begin = tl.minimum(edge + tl.arange(0, EDGES), count)  # threads without an edge: one without a length
            begin = tl.where(begin < count, begin, 0)
            end = tl.where((edge + tl.arange(0, EDGES) < count) & (begin + 1 < count), begin + 1, 0)
            px0 = _scaled(tl.load(vertex + begin * 2), x1, scale_x, FACTOR, LIMIT)[None, :]
            py0 = _scaled(tl.load(vertex + begin * 2 + 1), y1, scale_y, FACTOR, LIMIT)[None, :]
            px1 = _scaled(tl.load(vertex + end * 2), x1, scale_x, FACTOR, LIMIT)[None, :]
            py1 = _scaled(tl.load(vertex + end * 2 + 1), y1, scale_y, FACTOR, LIMIT)[None, :]
            words ^= tl.xor_sum(_words(px0, py0, px1, py1, columns[:, None], first_row, HEIGHT, FACTOR), 1)
            edge += EDGES
        union |= words
        part += 1

    rows = tl.arange(0, ROWS)
    inside = (union[None, :] >> rows[:, None].to(tl.uint32)) & 1
    place = (first_row + rows)[:, None] * WIDTH + columns[None, :]
    stored = (first_row + rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]
    tl.store(out + roi * (HEIGHT * WIDTH) + place, inside.to(tl.float32), mask=stored)


@lru_cache(maxsize=1024)
def _prepared(size: tuple[int, int]) -> tuple[int, int, Launch]:
    """The programs of a target, down and across, and the launch."""
    height, width = size
    columns = min(MAX_COLUMNS, next_power_of_2(width))
    rows = min(BITS, next_power_of_2(height))
    return (
        ceil_div(height, rows),
        ceil_div(width, columns),
        Launch(
            _polygon_targets_kernel,
            HEIGHT=height,
            WIDTH=width,
            ROWS=rows,
            COLUMNS=columns,
            EDGES=EDGES,
            FACTOR=UPSAMPLING,
            LIMIT=MAX_COORDINATE,
            MIN_SIDE=MIN_SIDE,
            POLYGONS=POLYGONS,
            OBJECT_COLUMNS=OBJECT_COLUMNS,
            num_warps=1,
            enable_fp_fusion=False,
        ),
    )


def launch_polygons(
    vertices: Tensor,
    parts: Tensor,
    objects: Tensor,
    boxes: Tensor,
    matches: Tensor,
    offsets: Tensor | None,
    out: Tensor,
    slots: int,
    size: tuple[int, int],
) -> None:
    """Write the targets of polygons, and zeros for all other RoIs."""
    down, across, launch = _prepared(size)
    boxes = boxes if boxes.itemsize >= 4 else boxes.float()
    with on_device_of(out):
        launch(
            (matches.numel(), down, across),
            vertices.contiguous(),
            parts.contiguous(),
            objects,
            boxes,
            matches,
            offsets,
            out,
            slots,
            len(objects),
        )
