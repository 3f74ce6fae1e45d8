"""COCO's run-length encoding of masks."""

from __future__ import annotations

from typing import Any

import torch
from pycocotools import mask as coco_mask

from models.marks import mark
from models.structures import Detections

# Memory for the masks that are pasted at once: 31 masks of 800 x 1333, of the up to 100 of an image.
PASTE_BYTES = 32 * 2**20


@mark("RLE")
def encode_masks(detections: Detections) -> list[dict[str, Any]]:
    """Paste the masks of one image and encode them in COCO's compressed run-length encoding.

    Masks are pasted in slices of at most `PASTE_BYTES`, but of at least one mask. Each slice is copied to the CPU,
    which synchronises.

    Args:
        detections: with mask probabilities.

    Returns:
        For each detection `{"size": [H, W], "counts": text}`.
    """
    height, width = detections.image_size
    step = max(1, PASTE_BYTES // (height * width))
    encoded = []
    for start in range(0, len(detections), step):
        columns = detections[start : start + step].masks().mT.contiguous()  # [n, W, H]: runs go down the columns
        encoded += coco_mask.encode(columns.view(torch.uint8).cpu().numpy().T)  # [H, W, n] in Fortran's order
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]
