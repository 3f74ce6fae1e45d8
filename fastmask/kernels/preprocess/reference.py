"""Preprocessing in plain torch: the reference, and what runs on the CPU.

Each pass along an axis is a weighted sum of the rows of a matrix, `embedding_bag`, whose rows are whole lines of the
image. `interpolate` is up to twice as fast with two threads, but rounds its weights: its error of 0.02 grey levels is
four hundred times that of these sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastmask.kernels.preprocess.op import PreprocessSpec


def preprocess_reference(images: Sequence[Tensor], sizes: Sequence[int], spec: PreprocessSpec) -> tuple[Tensor, Tensor]:
    """Image by image; `sizes` are the height and width of each, `images` are `[3, h, w]` each."""
    device = images[0].device
    out, out_sizes = spec.empty_outputs(images)
    mean, std = (torch.tensor(values, device=device)[:, None] for values in (spec.mean, spec.std))
    for index, (image, padded) in enumerate(zip(images, out, strict=True)):
        height, width = sizes[2 * index], sizes[2 * index + 1]
        pixels = (image.flip(0) if spec.channels == "BGR" else image).movedim(1, 0)  # [h, 3, w]: a line of 3 * w
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if height <= len(pixels):  # the axis that grows comes last
            pixels = _resize_lines(pixels.flatten(1), height, spec.antialias).view(height, 3, -1)
        if width != pixels.shape[2]:
            columns = pixels.flatten(0, 1).t().contiguous()
            pixels = _resize_lines(columns, width, spec.antialias).t().contiguous().view(-1, 3, width)
        pixels = _resize_lines(pixels.flatten(1), height, spec.antialias).view(height, 3, width)
        padded[:, :height, :width] = pixels.sub_(mean).div_(std).movedim(0, 1)
        padded[:, height:] = 0
        padded[:, :height, width:] = 0
    out_sizes.copy_(torch.tensor(sizes, device=device).view(-1, 2))
    return out, out_sizes


def _resize_lines(lines: Tensor, size: int, antialias: bool) -> Tensor:
    """`[size, m]` from `[n, m]`."""
    if len(lines) == size:
        return lines
    scale = len(lines) / size
    radius = max(scale, 1.0) if antialias else 1.0
    position = (torch.arange(size, dtype=torch.float64, device=lines.device) + 0.5) * scale - 0.5
    if radius == 1:
        position.clamp_(0, len(lines) - 1)
    first = (position - radius).floor().long() + 1
    index = first[:, None] + torch.arange(math.ceil(2 * radius), device=lines.device)
    weight = (1 - (index - position[:, None]).abs() / radius).clamp_(min=0)
    weight.masked_fill_((index < 0) | (index >= len(lines)), 0)
    weight = (weight / weight.sum(1, keepdim=True)).float()
    index.clamp_(0, len(lines) - 1)
    return F.embedding_bag(index, lines, per_sample_weights=weight, mode="sum")
