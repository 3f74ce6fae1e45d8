"""The static model of pasting masks: what its kernel does with the boxes of `harness/workloads.py`."""

from __future__ import annotations

import torch

from benchmarks.harness.operators import Launch, ModelTarget, Trips, Work
from benchmarks.harness.workloads import objects
from fastmask.kernels.paste_masks import CONVENTIONS, _span


def _paste(launch: Launch) -> Work:
    a = launch.arguments
    height, width, side, tiles = a["height"], a["width"], a["M"], a["TILES"]
    count = len(a["masks"])
    boxes = objects(count, image=(height, width))
    start, end, _ = _span(boxes, side, CONVENTIONS[a["PADDING"]])
    reach = (1 - a["PADDING"]) * (end - start) / (2 * side)
    limit = boxes.new_tensor([width, height])
    left, top = (start - reach).floor().clamp(min=0).minimum(limit).long()[:, :, None].unbind(1)
    right, bottom = (end + reach).ceil().clamp(min=0).minimum(limit).long()[:, :, None].unbind(1)

    size = a["WORDS"] * -(-32 // a["BITS"]) if a["BITS"] < 64 else a["WORDS"]
    begin = torch.arange(count)[:, None] * (height * width)
    per_mask = a["programs_per_mask"] * tiles
    offset = (begin // size + torch.arange(per_mask)) * size - begin  # of each tile, in its mask
    exists = offset < height * width
    reached = exists & (offset + size > top * width + left) & (offset < bottom * width)
    first = top.maximum((offset + width - right).div(width, rounding_mode="floor"))
    last = bottom.minimum((offset + size - 1 - left).div(width, rounding_mode="floor") + 1)
    rows = (last - first).clamp(min=0) * reached
    whole = exists & (offset >= 0) & (offset + size <= height * width)

    num_tiles, num_reached = int(exists.sum()), int(reached.sum())
    in_program = rows.unflatten(1, (-1, tiles)).sum(2)
    reached_share, tiles_of_program = num_reached / num_tiles, num_tiles / launch.programs
    trips: Trips = {"tile": tiles_of_program, "y": float(rows.sum()) / num_reached}
    longest: Trips = {"y": float(in_program.max()) / tiles_of_program}
    if a["BITS"] < 32:
        trips = {**trips, "i": 32.0 // a["BITS"]}
    inputs = a["masks"].nbytes + boxes.nbytes
    written = a["out"].nbytes
    return Work(
        hbm_bytes=inputs + written,
        l2_bytes=written + launch.programs * 16 + int((in_program > 0).sum()) * side * side * a["masks"].itemsize,
        trips=trips,
        branches={
            "if (offset + TILE_SIZE > top": reached_share,
            "if (offset >= 0)": float(whole.sum()) / num_tiles,
        },
        longest=longest,
    )


MODELS = {"_paste_masks_kernel": _paste}
TARGETS = tuple(
    ModelTarget(f"100 masks 28x28, {convention}, bool", ("_paste_masks_kernel",), 40) for convention in CONVENTIONS
)
