"""The static model of RoIPool: what its kernels do with the boxes of `harness/workloads.py`."""

from __future__ import annotations

import torch

from benchmarks.harness.operators import Launch, ModelTarget, Work
from benchmarks.harness.pooling import Inputs
from benchmarks.harness.workloads import C4, objects
from fastmask.kernels.roi_pool.geometry import bin_spans, quantise

SCALE = 1 / C4.stride
BOX_BYTES = 20


def _forward(launch: Launch) -> Work:
    a = launch.arguments
    feature, count, (pooled_y, pooled_x) = a["features"], a["num_boxes"], (a["PH"], a["PW"])
    boxes = objects(count)
    rois = torch.nn.functional.pad(boxes, (1, 0))
    x1, y1, width, height = quantise(rois, SCALE)
    _, rows = bin_spans(y1, height, pooled_y, a["height"], torch.float32)
    _, columns = bin_spans(x1, width, pooled_x, a["width"], torch.float32)
    bins = pooled_y * pooled_x
    blocks = -(-bins // a["BINS"])
    filler = (0, blocks * a["BINS"] - bins)  # the last program of a box has bins that do not exist
    rows = torch.nn.functional.pad(rows.repeat_interleave(pooled_x, 1), filler)
    columns = torch.nn.functional.pad(columns.repeat(1, pooled_y), filler)
    i = rows.unflatten(1, (blocks, -1)).amax(2).float()
    j = columns.unflatten(1, (blocks, -1)).amax(2).float()
    most = int((i * j).argmax())
    outputs = count * bins * a["C"] * (feature.itemsize + 4)
    return Work(
        hbm_bytes=Inputs([feature], [boxes], [C4.stride]).bytes("forward", outputs),
        l2_bytes=int((rows * columns).sum()) * a["C"] * feature.itemsize + outputs + launch.programs * BOX_BYTES,
        trips={"i": float(i.mean()), "j": float((i * j).mean() / i.mean())},
        longest={"i": float(i.flatten()[most]), "j": float(j.flatten()[most])},
    )


def _backward(launch: Launch) -> Work:
    a = launch.arguments
    grad, output, count = a["grad"], a["grad_input"], a["num_boxes"]
    boxes = objects(count)
    x1, y1, width, height = quantise(torch.nn.functional.pad(boxes, (1, 0)), SCALE)
    along = []
    for start, size, pooled, extent in ((y1, height, a["PH"], a["height"]), (x1, width, a["PW"], a["width"])):
        begin = torch.arange(0, extent, a["TILE"])[:, None]
        low = ((begin - start) / (size / pooled)).floor().clamp(0, pooled)
        high = ((begin + a["TILE"] - start) / (size / pooled)).ceil().clamp(0, pooled)
        along.append((high - low).clamp(min=0))  # bins that a tile visits, `[tiles, K]`
    visited = along[0][:, None] * along[1]  # [tiles of y, tiles of x, K]
    steps = (visited / a["UNROLL"]).ceil()
    touched = (visited > 0).float().sum(2)
    lists = -(-count // a["STEP"])
    tiles = touched.numel()
    channel_blocks = launch.programs // tiles
    row_bytes = a["C"] * (grad.itemsize + 4)
    return Work(
        hbm_bytes=Inputs([output], [boxes], [C4.stride]).bytes("backward", count * a["PH"] * a["PW"] * row_bytes),
        l2_bytes=float(visited.sum()) * row_bytes + tiles * channel_blocks * count * BOX_BYTES + output.nbytes,
        trips={
            "first": float(lists),
            "nearest": float(touched.mean()) / lists,
            "start": float(steps.sum() / touched.sum()),
        },
        longest={"nearest": float(touched.max()) / lists},
    )


MODELS = {"_roi_pool_backward_kernel": _backward, "_roi_pool_kernel": _forward}
CASE = "512 RoIs 7x7, 1024 channels, bfloat16"
TARGETS = (ModelTarget(CASE, ("_roi_pool_kernel",), 130), ModelTarget(CASE, ("_roi_pool_backward_kernel",), 260))
