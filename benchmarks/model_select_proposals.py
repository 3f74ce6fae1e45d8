"""The static model of selecting proposals: what its kernels do with an 800 x 1344 image."""

from __future__ import annotations

from benchmarks import model_nms
from benchmarks.harness.operators import Launch, ModelTarget, Work

SECTOR = 32
KEPT = 0.8  # of the candidates of a level after NMS at 0.7, of the inputs of `bench_select_proposals.py`


def _counts(launch: Launch) -> list[int]:
    """Candidates of each level."""
    return [packed >> 31 & (1 << 30) - 1 for packed in launch.arguments["sizes"]]


def _decode(launch: Launch) -> Work:
    a = launch.arguments
    counts, batch = _counts(launch), launch.programs // len(a["logits"])
    read = a["logits"][0].itemsize + 8 + 4 * (a["deltas"][0].itemsize + a["anchors"][0].itemsize)
    written = 5 * a["boxes"].itemsize + 8
    gathered = a["logits"][0].itemsize + 8 + 2 * SECTOR  # a candidate's deltas and its anchor
    candidates = batch * sum(counts)
    blocks = [-(-count // a["BLOCK"]) for count in counts]
    return Work(
        hbm_bytes=candidates * (read + written),
        l2_bytes=candidates * (gathered + written),
        trips={"first": sum(blocks) / len(blocks)},
        longest={"first": float(max(blocks))},
    )


def _merge(launch: Launch) -> Work:
    a = launch.arguments
    images, item = len(a["out_counts"]), a["scores"].itemsize
    kept = images * a["LEVELS"] * round(KEPT * a["max_kept"])
    stored = images * a["num_proposals"] * 5 * item
    searched = a["steps"] * (a["LEVELS"] - 1) * 3 * 2 * SECTOR  # of a row, the index and score of three probes
    return Work(
        hbm_bytes=kept * (8 + item) + 2 * stored,
        l2_bytes=kept * (8 + item + 4 * item + searched / 4) + stored,  # rows of a warp read the same first steps
        trips={"_": float(a["steps"])},
    )


MODELS = model_nms.MODELS | {"decode_candidates_kernel": _decode, "merge_levels_kernel": _merge}
TARGETS = (ModelTarget("proposals of R-50-FPN", ("decode_candidates_kernel", "merge_levels_kernel"), 20),)
