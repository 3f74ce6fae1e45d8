"""The static model of selecting detections: what its kernels do with 1000 proposals of 80 classes."""

from __future__ import annotations

from benchmarks import model_nms
from benchmarks.harness.operators import Launch, ModelTarget, Work

SECTOR = 32
PROPOSALS = 1000  # of an image
CANDIDATES = 2.0  # classes of a proposal whose scores exceed 0.05, of the logits of `bench_select_detections.py`


def _score(launch: Launch) -> Work:
    a = launch.arguments
    rows, item = a["num_rows"], a["boxes"].itemsize
    candidates = CANDIDATES if a["SLOTS"] < a["C"] - 1 else a["SLOTS"]
    decoded = a["DELTAS"] if a["DROP_NON_FINITE"] else candidates
    read = a["C"] * a["class_logits"].itemsize + 4 * a["proposals"].itemsize
    written = candidates * (5 * item + 4) + (a["SLOTS"] - candidates) * item + 4
    sectors = decoded * max(4 * a["deltas"].itemsize, SECTOR if decoded < a["DELTAS"] else 0)
    return Work(
        hbm_bytes=rows * (read + decoded * 4 * a["deltas"].itemsize + written),
        l2_bytes=rows * (read + sectors + candidates * (SECTOR + SECTOR + SECTOR) + written),
    )


def _list(launch: Launch) -> Work:
    a = launch.arguments
    rows, item = a["num_candidates"].numel(), a["scores"].itemsize
    programs = -(-a["num_proposals"] // a["PROPOSALS"])
    earlier = [-(-program * a["PROPOSALS"] // 1024) for program in range(programs)]
    moved = rows * (4 + CANDIDATES * (2 * item + 4))
    return Work(
        hbm_bytes=moved,
        l2_bytes=moved + launch.programs * a["num_proposals"] * 2 + rows * CANDIDATES * SECTOR,
        trips={"first": sum(earlier) / programs},
        longest={"first": float(max(earlier))},
    )


def _order(launch: Launch) -> Work:
    a = launch.arguments
    images, slots = a["listed_scores"].shape
    candidates = round(CANDIDATES * PROPOSALS)
    active = -(-candidates // a["ROWS"]) / -(-slots // a["ROWS"])
    return Work(
        hbm_bytes=images * candidates * (4 + 4 + 8),
        l2_bytes=active * launch.programs * candidates * 4 + images * candidates * (4 + 4 + 8),
        trips={"first": float(-(-candidates // a["COLUMNS"]))},
        branches={"if begin < total": active},
    )


def _gather(launch: Launch) -> Work:
    a = launch.arguments
    rows, item = a["out_scores"].numel(), a["boxes"].itemsize
    written = rows * (5 * item + 8)
    return Work(
        hbm_bytes=rows * (8 + 5 * item + 4) + written,
        l2_bytes=rows * (8 + 3 * SECTOR) + written,
    )


MODELS = {
    **model_nms.MODELS,
    "score_proposals_kernel": _score,
    "list_candidates_kernel": _list,
    "order_candidates_kernel": _order,
    "gather_detections_kernel": _gather,
}
BEFORE_NMS = ("score_proposals_kernel", "list_candidates_kernel", "order_candidates_kernel")
TARGETS = (ModelTarget("detections of 1000 x 80", BEFORE_NMS, 20),)
