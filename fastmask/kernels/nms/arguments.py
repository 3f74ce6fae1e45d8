"""Checks of arguments that several kinds of non-maximum suppression share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._validation import (
    MAX_INT32,
    check_counts_dtype,
    check_int,
    check_same_device,
    check_tensor,
)


def check_boxes(boxes: Tensor, dimensions: tuple[str, ...], scores: Tensor) -> None:
    """`boxes[*dimensions, 4]` and a score for each."""
    check_tensor("boxes", boxes, floating=True)
    check_tensor("scores", scores, floating=True)
    if boxes.ndim != len(dimensions) + 1 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes: expected [{', '.join(dimensions)}, 4], got {list(boxes.shape)}")
    check_matches_boxes("scores", scores, boxes, boxes.shape[:-1])


def check_classes(classes: Tensor, boxes: Tensor) -> None:
    """A class for each of `boxes[B, N, 4]`."""
    check_tensor("classes", classes, real=True)
    check_matches_boxes("classes", classes, boxes, boxes.shape[:2])


def check_counts(counts: Tensor, boxes: Tensor) -> None:
    """A count for each segment of `boxes[B, N, 4]`."""
    check_counts_dtype("counts", counts)
    check_matches_boxes("counts", counts, boxes, boxes.shape[:1])


def check_max_output(max_output: Any, boxes: Tensor) -> int:
    """A number of results for each segment of `boxes[B, N, 4]`."""
    max_output = check_int("max_output", max_output, least=0)
    if boxes.shape[0] * max_output > MAX_INT32:
        raise ValueError(f"max_output: expected fewer than 2^31 results in {boxes.shape[0]} segments, got {max_output}")
    return max_output


def check_matches_boxes(name: str, tensor: Tensor, boxes: Tensor, shape: torch.Size) -> None:
    """`tensor` has this shape and is on the device of `boxes`."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)} to match boxes, got {list(tensor.shape)}")
    check_same_device(name, tensor, "boxes", boxes)
