"""COCO's run-length encoding of masks."""

from __future__ import annotations

from typing import Any

import torch
from pycocotools import mask as coco_mask

from models.structures import Detections

# Of pasted masks held at a time: 31 of 800 x 1333, out of up to 100 in an image.
PASTE_BYTES = 32 * 2**20


def encode_masks(detections: Detections) -> list[dict[str, Any]]:
    """COCO's compressed run-length encoding of each pasted mask, `counts` as text. Holds `PASTE_BYTES` of them."""
    height, width = detections.image_size
    step = max(1, PASTE_BYTES // (height * width))
    encoded = []
    for start in range(0, len(detections), step):
        columns = detections[start : start + step].masks().mT.contiguous()  # [n, W, H]: runs go down the columns
        encoded += coco_mask.encode(columns.view(torch.uint8).cpu().numpy().T)  # [H, W, n] in Fortran's order
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]
