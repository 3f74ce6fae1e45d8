"""The operators `fastmask::encode_rle`, `fastmask::encode_rle_padded` and `fastmask::encode_bitmaps`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.kernels._runtime import register
from fastmask.kernels.encode_rle.forward import launch_encode_bitmaps, launch_encode_rle, launch_encode_rle_padded
from fastmask.kernels.encode_rle.reference import (
    RLESpec,
    encode_bitmaps_reference,
    encode_rle_padded_reference,
    encode_rle_reference,
)


def _fake_on_host(count: int) -> tuple[Tensor, Tensor]:
    """Strings and lengths; the strings' length is data."""
    size = torch.library.get_ctx().new_dynamic_size()
    strings = torch.empty(size, dtype=torch.uint8, device="cpu")
    return strings, torch.empty(count, dtype=torch.int64, device="cpu")


def _fake_encode_rle_padded(
    masks: Tensor, _boxes: Tensor, _counts: Tensor | None, capacity: int, _spec: RLESpec
) -> tuple[Tensor, Tensor]:
    batch, num_masks = masks.shape[:2]
    strings = masks.new_empty(batch * num_masks * capacity, dtype=torch.uint8)
    return strings, masks.new_empty(batch, num_masks, dtype=torch.int64)


encode_rle_op = register(
    "encode_rle(Tensor masks, Tensor boxes, *spec) -> (Tensor, Tensor)",
    reference=encode_rle_reference,
    launch=launch_encode_rle,
    fake=lambda masks, _boxes, _spec: _fake_on_host(len(masks)),
    spec=RLESpec,
)
encode_rle_padded_op = register(
    "encode_rle_padded(Tensor masks, Tensor boxes, Tensor? counts, SymInt capacity, *spec) -> (Tensor, Tensor)",
    reference=encode_rle_padded_reference,
    launch=launch_encode_rle_padded,
    fake=_fake_encode_rle_padded,
    spec=RLESpec,
)
encode_bitmaps_op = register(
    "encode_bitmaps(Tensor bitmaps) -> (Tensor, Tensor)",
    reference=encode_bitmaps_reference,
    launch=launch_encode_bitmaps,
    fake=lambda bitmaps: _fake_on_host(len(bitmaps)),
)
