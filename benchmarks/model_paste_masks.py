"""The static model of pasting masks: what its kernel does with the boxes of `harness/workloads.py`."""

from __future__ import annotations

import torch

from benchmarks.harness.operators import Launch, ModelTarget, Trips, Work
from benchmarks.harness.workloads import objects
from fastmask.kernels._mask_sampling import CONVENTIONS, mask_span


def _paste(launch: Launch) -> Work:
    a = launch.arguments
    height, width, side, tiles = a["height"], a["width"], a["M"], a["TILES"]
    count = len(a["masks"])
    boxes = objects(count, image=(height, width))
    start, end, _ = mask_span(boxes, side, CONVENTIONS[a["PADDING"]])
    reach = (1 - a["PADDING"]) * (end - start) / (2 * side)
    limit = boxes.new_tensor([width, height])
    left, top = (start - reach).floor().clamp(min=0).minimum(limit).long()[:, :, None].unbind(1)
    right, bottom = (end + reach).ceil().clamp(min=0).minimum(limit).long()[:, :, None].unbind(1)

    vector, vectors = 16 // a["out"].itemsize, a["VECTORS"]
    size, per_mask = vectors * vector, a["programs_per_mask"]
    begin = torch.arange(count)[:, None] * (height * width)
    offset = torch.arange(per_mask) * (size * tiles) - begin % size  # of each program's tiles, in its mask
    end = offset + size * tiles
    clear = (end <= top * width + left) | (offset >= bottom * width)
    fast = clear & (offset >= 0) & (end <= height * width)
    slow_tiles = ((end.clamp(max=height * width) - offset) / size).ceil().clamp(min=0)[~fast]

    per_row = (right - left + vector - 2) // vector + 1  # vectors that a row of the box touches, at most
    total = per_row * (bottom - top).clamp(min=0)
    share = -(-total // (per_mask * vectors)) * vectors
    item = torch.arange(per_mask) * share
    steps = ((item + share).minimum(total) - item).clamp(min=0) / vectors
    busy = steps > 0
    trips: Trips = {
        "_fill.offset": float(slow_tiles.mean()),
        "item": float(steps[busy].ceil().mean()),
        "remaining": 1.0,
    }
    if a["out"].itemsize < 4:
        trips = {**trips, "i": 4.0 / a["out"].itemsize}
    written = a["out"].nbytes
    return Work(
        hbm_bytes=a["masks"].nbytes + boxes.nbytes + written,
        l2_bytes=written + launch.programs * 16 + int(busy.sum()) * side * side * a["masks"].itemsize,
        trips=trips,
        branches={
            "if (before | after)": float(fast.float().mean()),
            "if item < last_item": float(busy.float().mean()),
            "if tl.max(partial": 2 / per_mask,  # the first and the last vector of a mask
        },
        longest={"item": float(steps.ceil().max()), "_fill.offset": float(tiles)},
    )


MODELS = {"_paste_masks_kernel": _paste}
TARGETS = tuple(
    ModelTarget(f"100 masks 28x28, {convention}, bool", ("_paste_masks_kernel",), 40) for convention in CONVENTIONS
)
