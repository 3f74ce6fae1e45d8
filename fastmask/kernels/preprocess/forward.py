"""The kernel of preprocessing: a program writes a part of a row of one image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import (
    ceil_div,
    divide,
    divide_by_reciprocal,
    float64_bits,
    float_of,
    jit,
    on_device_of,
    pack_size,
    round_to_float32,
    tl,
)

if TYPE_CHECKING:
    from fastmask.kernels.preprocess.op import PreprocessSpec

MAX_STRIDE = 2**30 - 1  # what `pack_size` holds

# Images of one launch: their pointers and sizes are parameters of the kernel, which compiles for each number of images.
MAX_IMAGES = 16

# Pixels of a row in a program: 4 for each thread, so that the numbers of a row and of its filter, which all pixels
# share, are computed once for 128. By the static model on an H200, 480 x 640 to 800 x 1067 takes 10.4 us; with 2
# pixels a thread 13. One warp of 256 pixels needs 168 registers. The channels are stored one by one, with a stride of
# 3: L2 gets every sector three times, an estimated 3 us beside 8 us of instructions. Exchanging values between threads,
# to store whole lines, takes 11.2 us. Compiled: 96 registers on sm_90, 100 on sm_100, 50 on gfx942, no spills. Not yet
# measured on a GPU.
TILE = 128
NUM_WARPS = 1


@jit()
def _size_of(packed):
    """The two numbers of `pack_size`."""
    return ((packed >> 31) & 0x3FFFFFFF).to(tl.int32), ((packed >> 1) & 0x3FFFFFFF).to(tl.int32)


@jit()
def _axis(index, size, resized, ANTIALIAS: tl.constexpr):
    """Of output pixels along one axis: position, first tap, number of taps, 1 / r."""
    scale = divide(size.to(tl.float32), resized.to(tl.float32))
    position = (index.to(tl.float32) + 0.5) * scale - 0.5
    one = tl.full((), 1.0, tl.float32)
    radius = one
    if ANTIALIAS:
        radius = tl.maximum(scale, 1.0)
    if not ANTIALIAS or scale <= 1.0:
        position = tl.minimum(tl.maximum(position, 0.0), (size - 1).to(tl.float32))
    first = tl.floor(position - radius).to(tl.int32) + 1
    taps = tl.where(size == resized, 1, tl.ceil(2 * radius).to(tl.int32))
    return position, first, taps, divide(one, radius)


@jit()
def _tap(pixel, position, inverse, size):
    """The weight of a pixel along one axis, 0 outside the image, and the pixel, clamped to the image."""
    clamped = tl.minimum(tl.maximum(pixel, 0), size - 1)
    weight = tl.maximum(1 - tl.abs(pixel.to(tl.float32) - position) * inverse, 0.0)
    return tl.where(pixel == clamped, weight, 0.0), clamped


@jit()
def _to_float(x):
    """A float32. A uint8 becomes the lowest bits of 2^23 + x, which takes fewer cycles than a conversion."""
    if x.dtype == tl.uint8:
        return (x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return x.to(tl.float32)


@jit()
def _normalise(value, mean, std, reciprocal, inside, DIVIDE: tl.constexpr):
    value -= float_of(mean, tl.float32)
    if DIVIDE:
        value = divide(value, float_of(std, tl.float32))
    else:
        value = divide_by_reciprocal(value, float_of(std, tl.float32), float_of(reciprocal, tl.float32))
    return tl.where(inside, value, 0.0)


@jit(do_not_specialize=["num_rows", "width"])
def _preprocess_kernel(
    images,  # B of [3, h, w]
    out,  # [B, H, W, 3]
    out_sizes,  # [B, 2]
    input_sizes,  # B packed (h, w)
    strides,  # B packed strides of (rows, columns)
    planes,  # B packed strides of channels
    resized_sizes,  # B packed (h, w)
    num_rows,  # H
    width,  # W
    mean,  # 3 float64 bits
    std,
    reciprocals,  # of std
    BGR: tl.constexpr,
    ANTIALIAS: tl.constexpr,
    DIVIDE: tl.constexpr,  # because a product with the reciprocal could be another number
    TILE: tl.constexpr,
):
    tiles = (width + TILE - 1) // TILE
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) - row * tiles
    n = tl.program_id(1)
    image, input_size, stride, plane, resized = images[0], input_sizes[0], strides[0], planes[0], resized_sizes[0]
    for index in tl.static_range(1, len(images)):
        if n == index:
            image, input_size, stride = images[index], input_sizes[index], strides[index]
            plane, resized = planes[index], resized_sizes[index]
    height, columns = _size_of(input_size)
    row_stride, column_stride = _size_of(stride)
    _, plane_stride = _size_of(plane)
    resized_height, resized_width = _size_of(resized)
    if tl.program_id(0) == 0:
        tl.store(out_sizes + n * 2, resized_height.to(tl.int64))
        tl.store(out_sizes + n * 2 + 1, resized_width.to(tl.int64))

    column = tile * TILE + tl.arange(0, TILE)
    red = tl.zeros((TILE,), tl.float32)
    green, blue = red, red
    inside = (column < resized_width) & (row < resized_height)
    if (row < resized_height) & (tile * TILE < resized_width):
        y, first_row, row_taps, y_inverse = _axis(row, height, resized_height, ANTIALIAS)
        x, first_column, column_taps, x_inverse = _axis(column, columns, resized_width, ANTIALIAS)
        first, last = image, image + plane_stride.to(tl.int64) * 2
        if BGR:
            first, last = last, first
        middle = image + plane_stride
        x_sum = tl.zeros((TILE,), tl.float32)
        y_sum = 0.0
        for j in range(column_taps):
            x_weight, x_pixel = _tap(first_column + j, x, x_inverse, columns)
            offset = x_pixel * column_stride
            x_sum += x_weight
            y_sum = 0.0
            r = tl.zeros((TILE,), tl.float32)
            g, b = r, r
            for i in range(row_taps):
                y_weight, y_pixel = _tap(first_row + i, y, y_inverse, height)
                y_sum += y_weight
                line = y_pixel.to(tl.int64) * row_stride
                r = tl.fma(_to_float(tl.load(first + line + offset)), y_weight, r)
                g = tl.fma(_to_float(tl.load(middle + line + offset)), y_weight, g)
                b = tl.fma(_to_float(tl.load(last + line + offset)), y_weight, b)
            red, green, blue = tl.fma(r, x_weight, red), tl.fma(g, x_weight, green), tl.fma(b, x_weight, blue)
        if ANTIALIAS and ((height > resized_height) | (columns > resized_width)):  # otherwise the weights add up to 1
            inverse = divide(tl.full((TILE,), 1.0, tl.float32), x_sum * y_sum)
            red, green, blue = red * inverse, green * inverse, blue * inverse
        red = _normalise(red, mean[0], std[0], reciprocals[0], inside, DIVIDE)
        green = _normalise(green, mean[1], std[1], reciprocals[1], inside, DIVIDE)
        blue = _normalise(blue, mean[2], std[2], reciprocals[2], inside, DIVIDE)

    target = out + (n.to(tl.int64) * num_rows + row) * width * 3 + column * 3
    mask = column < width
    tl.store(target, red.to(out.dtype.element_ty), mask=mask)
    tl.store(target + 1, green.to(out.dtype.element_ty), mask=mask)
    tl.store(target + 2, blue.to(out.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def _prepared(
    sizes: tuple[int, ...], spec: PreprocessSpec, views: tuple[tuple[torch.Size, tuple[int, ...]], ...], is_uint8: bool
) -> tuple[int, Launch]:
    """The programs of an image, and the launch; `views` are the shape and strides of each image."""
    mean, std = ([round_to_float32(value) for value in values] for values in (spec.mean, spec.std))  # as the kernel has
    return spec.height * ceil_div(spec.width, TILE), Launch(
        _preprocess_kernel,
        tuple(pack_size(height, width) for (_, height, width), _ in views),
        tuple(pack_size(row, column) for _, (_, row, column) in views),
        tuple(pack_size(0, plane) for _, (plane, _, _) in views),
        tuple(pack_size(*size) for size in zip(sizes[::2], sizes[1::2], strict=True)),
        spec.height,
        spec.width,
        tuple(float64_bits(value) for value in spec.mean),
        tuple(float64_bits(value) for value in std),
        tuple(float64_bits(1 / value) for value in std),
        BGR=spec.channels == "BGR",
        ANTIALIAS=spec.antialias,
        DIVIDE=not (is_uint8 and all(1 <= value <= 2**60 for value in std) and min(mean) >= 2**-30),
        TILE=TILE,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def _fits(image: Tensor) -> bool:
    """Strides, and offsets in a row, are numbers of the kernel."""
    return max(image.stride()) <= MAX_STRIDE and (image.shape[2] - 1) * image.stride(2) <= MAX_STRIDE


def launch_preprocess(images: Sequence[Tensor], sizes: Sequence[int], spec: PreprocessSpec) -> tuple[Tensor, Tensor]:
    out, out_sizes = spec.empty_outputs(images)
    images = [image if _fits(image) else image.contiguous() for image in images]
    with on_device_of(images[0]):
        for begin in range(0, len(images), MAX_IMAGES):
            some = slice(begin, begin + MAX_IMAGES)
            part = tuple(images[some])
            views = tuple((image.shape, image.stride()) for image in part)
            resized = tuple(sizes[2 * begin : 2 * (begin + MAX_IMAGES)])
            programs, launch = _prepared(resized, spec, views, part[0].dtype == torch.uint8)
            launch((programs, len(part)), part, out[some], out_sizes[some])
    return out, out_sizes
