"""The static model of decoding keypoints: its kernel with peaked heatmaps and the boxes of `harness/workloads.py`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch.nn.functional as F

from benchmarks.harness.operators import Launch, ModelTarget, Work
from benchmarks.harness.workloads import objects
from fastmask.kernels.decode_keypoints.reference import _sides, _upper_bounds
from tests.oracles.decode_keypoints import draw_heatmaps

IMAGE = (800, 1333)


class _Cells(NamedTuple):
    """What a heatmap has of cells with candidates, in the mean, and the one that takes longest."""

    rows: float  # with such cells
    cells: float
    steps: float  # of pixels, in such a cell
    most_cells: float  # of the longest
    most_steps: float


@lru_cache
def _cells(persons: int, points: int, m: int, step: int) -> _Cells:
    """Candidates are cells whose bound reaches the largest heatmap pixel.

    The kernel starts with a threshold a little below it and ends a little above.
    """
    heatmaps = draw_heatmaps(persons, points, m, kind="peak").flatten(0, 1)
    bounds = _upper_bounds(F.pad(heatmaps[None], (2, 2, 2, 2), mode="replicate")[0])
    chosen = bounds >= heatmaps.amax((1, 2), keepdim=True)
    of_heatmap = chosen.sum((1, 2)).double()
    _, sizes = _sides(objects(persons, image=IMAGE))
    per_cell = (sizes / m + 1).ceil().prod(1)  # resized pixels, about
    steps = (per_cell / step).ceil().repeat_interleave(points).double()
    longest = (of_heatmap * steps).argmax()
    return _Cells(
        rows=chosen.any(2).sum(1).double().mean().item(),
        cells=of_heatmap.mean().item(),
        steps=((of_heatmap * steps).sum() / of_heatmap.sum()).item(),
        most_cells=of_heatmap[longest].item(),
        most_steps=steps[longest].item(),
    )


def _decode(launch: Launch) -> Work:
    a = launch.arguments
    heatmaps, height = a["heatmaps"], float(a["H"])
    of = _cells(heatmaps.shape[0], a["P"], a["H"], a["STEP"])
    moved = heatmaps.nbytes + a["boxes"].nbytes + a["keypoints"].nbytes + a["scores"].nbytes
    return Work(
        hbm_bytes=moved,
        l2_bytes=moved,
        trips={
            "cell_y": height + 1,
            "cell_x": of.cells / of.rows,
            "pixel": of.steps,
        },
        branches={"if cell_x < COLUMNS": of.rows / (height + 1)},
        longest={"cell_x": of.most_cells / (height + 1), "pixel": of.most_steps},  # every row counts as reached
    )


MODELS = {"_decode_keypoints_kernel": _decode}
TARGETS = (ModelTarget("100 persons 17x56x56, torchvision, float32", ("_decode_keypoints_kernel",), 85),)
