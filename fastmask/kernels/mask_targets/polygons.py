"""Polygons rasterised as pycocotools does it, exactly: the arithmetic, and the CPU path.

Vertices are scaled by 5 and rounded to integers (X, Y), and each edge between two of them is a line of integer points:

    dX >= dY:  (a + t, trunc(b + s * t + 1/2))     a, b the X and Y of the left end, s = slope of Y over X
    dX <  dY:  (trunc(b + s * t + 1/2), a + t)     a, b the Y and X of the upper end, s = slope of X over Y

for t = 0, 1, ... in float64. Wherever the line steps between X = 5c + 2 and X = 5c + 3, it crosses the centre of pixel
column c, at row r = ceil((Y - 2) / 5) for the lesser Y of the two points, clamped to [0, H]. A pixel of column c is
inside if an odd number of crossings of its column have r <= its row; an object is the union of its polygons.

pycocotools lists all points of all lines; here each edge and column has at most one crossing, in closed form. It
exists if exactly one end has X <= 5c + 2. In the first case t follows from the column. In the second, the crossing is
between T and T + 1 for the last T whose point is still on the first end's side of the column. The real solution rounded
to an integer, n, is T or T + 1, and evaluating the point n itself, in pycocotools' order of operations, tells which:
the computed points are monotone in t, and for |X|, |Y| <= 2^24 their rounding errors shift the solution by less than
1/4. Vertices farther out are moved to that distance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UPSAMPLING = 5
MAX_COORDINATE = 2.0**24  # of scaled vertices
MIN_SIDE = 0.1  # of a box, in image pixels, as detectron2 has it

# Memory of the reference: about 150 bytes for each edge, and two for each pixel and polygon.
MAX_EDGES = 1 << 18
MAX_PIXELS = 1 << 24


class Crossings(NamedTuple):
    """Edges that cross pixel columns, in scaled integer coordinates, as float64."""

    x0: Tensor
    y0: Tensor
    x1: Tensor
    y1: Tensor
    polygon: Tensor  # that each belongs to
    first: Tensor  # the first column that is crossed
    columns: Tensor  # how many are


def expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For ranges of `counts` elements one after the other: each element's range, and its place in the range."""
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(len(owner), device=counts.device) - (counts.cumsum(0) - counts)[owner]


def rasterize(
    vertices: Tensor, parts: Tensor, boxes: Tensor, first: Tensor, count: Tensor, size: tuple[int, int]
) -> Tensor:
    """Rasterise the object of each box in the box's frame.

    Args:
        vertices: `[V, 2]`, in image pixels.
        parts: `[P, 2]`, the first vertex and the number of vertices of each polygon.
        boxes: `[K, 4]` float64, finite.
        first, count: `[K]`, the polygons of each box's object.
        size: H, W.

    Returns:
        `[K, H, W]` float32, 0 or 1.
    """
    out = torch.empty(len(boxes), *size, dtype=torch.float32, device=boxes.device)
    # The number of edges of the objects before each one's polygons, of which objects share none or all.
    edges = torch.cat([parts.new_zeros(1), parts[:, 1].cumsum(0)])
    edges = edges[first + count] - edges[first]
    cost = (edges.cumsum(0) // MAX_EDGES).maximum(count.cumsum(0) * (size[0] * size[1]) // MAX_PIXELS)
    _, pieces = torch.unique_consecutive(cost, return_counts=True)
    for piece in torch.arange(len(boxes), device=boxes.device).split(pieces.tolist()):
        box, part = expand(count[piece])
        part = parts[first[piece][box] + part]
        inside = _parity(_crossing_edges(vertices, part, boxes[piece[box]], size), len(part), size)
        if len(part) == len(piece):  # one polygon each
            out[piece] = inside.to(out.dtype)
        else:
            out[piece] = out.new_zeros(len(piece), *size).index_add_(0, box, inside.to(out.dtype)).clamp_(max=1)
    return out


def _crossing_edges(vertices: Tensor, part: Tensor, boxes: Tensor, size: tuple[int, int]) -> Crossings:
    """The edges of polygons `part [Q, 2]` that cross columns, each in the frame of its box `[Q, 4]`.

    Most edges of a detailed polygon cross none: their y are not even read.
    """
    polygon, place = expand(part[:, 1])
    vertex = part[polygon, 0] + place
    scale = boxes.new_tensor([size[1], size[0]]) / (boxes[:, 2:] - boxes[:, :2]).clamp(min=MIN_SIDE)
    x = _scaled(vertices[:, 0][vertex], boxes[:, 0][polygon], scale[:, 0][polygon])
    column = ((x + 2) / UPSAMPLING).floor_().clamp_(0, size[1])  # of the first centre at the vertex or to its right
    last = part[:, 1].cumsum(0) - 1
    following = torch.arange(1, len(x) + 1, device=x.device).index_copy_(0, last, last - part[:, 1] + 1)
    crossing = (column != column[following]).nonzero()[:, 0]

    start, end, polygon = crossing, following[crossing], polygon[crossing]
    y0, y1 = (_scaled(vertices[:, 1][vertex[i]], boxes[:, 1][polygon], scale[:, 1][polygon]) for i in (start, end))
    first, beyond = column[start].minimum(column[end]).long(), column[start].maximum(column[end]).long()
    return Crossings(x[start], y0, x[end], y1, polygon, first, beyond - first)


def _scaled(coordinates: Tensor, start: Tensor, scale: Tensor) -> Tensor:
    points = (coordinates.double() - start).mul_(scale).mul_(UPSAMPLING).add_(0.5)
    return points.nan_to_num_(-MAX_COORDINATE).clamp_(-MAX_COORDINATE, MAX_COORDINATE).trunc_()


def _parity(crossings: Crossings, num_polygons: int, size: tuple[int, int]) -> Tensor:
    """`[Q, H, W]` uint8, the pixels inside each polygon."""
    height, width = size
    edge, column = expand(crossings.columns)
    column += crossings.first[edge]
    row = _rows(crossings, edge, column, height)
    toggles = torch.zeros(num_polygons, width, height + 1, dtype=torch.uint8, device=row.device)
    place = (crossings.polygon[edge] * width + column) * (height + 1) + row
    toggles.view(-1).scatter_add_(0, place, toggles.new_ones(()).expand(len(place)))
    return toggles.cumsum(2, dtype=torch.uint8)[:, :, :-1].bitwise_and_(1).transpose(1, 2)


def _rows(crossings: Crossings, edge: Tensor, column: Tensor, height: int) -> Tensor:
    """The row at which each edge crosses a column that it is known to cross."""
    x0, y0, x1, y1 = crossings[:4]
    flat = (x1 - x0).abs() >= (y1 - y0).abs()
    # Along the longer axis from a, over `length` steps; along the other from b.
    a0, a1, b0, b1 = x0.where(flat, y0), x1.where(flat, y1), y0.where(flat, x0), y1.where(flat, x1)
    ascending = a0 <= a1
    a, b = a0.where(ascending, a1), b0.where(ascending, b1)
    length = (a1 - a0).abs()
    rise = b1.where(ascending, b0) - b
    packed = torch.stack([a, b, length, rise, rise / length, length / rise, flat.double()], 1)[edge]
    a, b, length, rise, slope, inverse, flat = packed.unbind(1)
    flat = flat > 0
    boundary = (column * UPSAMPLING + UPSAMPLING // 2).double()
    steep_step = ((boundary + 0.5 - b) * inverse + 0.5).floor_().maximum(length.new_zeros(())).minimum(length)
    step = (boundary - a + (rise < 0)).where(flat, steep_step)
    minor = b + slope * step + 0.5
    before = torch.where(rise > 0, minor < boundary + 1, minor >= boundary + 1)
    y = minor.trunc().where(flat, a + step - 1 + before)
    return ((y.clamp_(min=-2) + 2) / UPSAMPLING).floor_().clamp_(max=height).long()
