"""The static model of soft NMS: its kernel selects 100 of the boxes of `harness/workloads.py`."""

from __future__ import annotations

from benchmarks.harness.operators import Launch, ModelTarget, Trips, Work


def _soft_nms(launch: Launch) -> Work:
    """The first tile has every box that is selected: `bench_soft_nms.py` has no case in which a later one enters."""
    a = launch.arguments
    steps, tile = float(a["max_output"]), min(a["TILE"], a["num_boxes"])
    box = 4 * a["boxes"].itemsize + a["scores"].itemsize + (0 if a["classes"] is None else a["classes"].itemsize)
    box += 0 if a["order"] is None else 8
    trips: Trips = {"kept": steps, "first": 0.0}
    if a["order"] is not None:
        trips = {**trips, "first": (0.0, 0.0), "entering": 0.0, "k": 0.0}
    return Work(
        hbm_bytes=len(a["boxes"]) * (tile * box + steps * (8 + a["selected"].itemsize)),
        l2_bytes=len(a["boxes"]) * (tile * box + steps * (32 + 2 * 32)),
        trips=trips,
    )


MODELS = {"_soft_nms_kernel": _soft_nms}
TARGETS = (
    ModelTarget("soft NMS of 1000, linear", ("_soft_nms_kernel",), 100),
    ModelTarget("soft NMS of 80000 by class, linear", ("_soft_nms_kernel",), 200),
)
