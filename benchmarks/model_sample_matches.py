"""The static model of sampling: what its kernels do with labels of which nearly all are negative."""

from __future__ import annotations

from benchmarks.harness.operators import Launch, ModelTarget, Work

SECTOR = 32


def _count(launch: Launch) -> Work:
    a = launch.arguments
    moved = a["labels"].nbytes + a["counts"].nbytes
    return Work(hbm_bytes=moved, l2_bytes=moved)


def _draw(launch: Launch) -> Work:
    """Few steps swap with a place that an earlier one swapped with: most samples need one look at the others."""
    a = launch.arguments
    parts = float(-(-a["tiles"] // a["TILES"]))
    draws = a["samples"] / 2 * 8  # of the earlier samples, in the mean
    read = 4 * a["counts"].nbytes / len(a["labels"]) + draws + a["BLOCK"] * a["labels"].itemsize
    return Work(
        hbm_bytes=launch.programs * (8 + 9),
        l2_bytes=launch.programs * (read + 2 * SECTOR),
        trips={
            "_sum.first": (parts, parts),
            "moved": 1.0,
            "first": (max(1.0, a["samples"] / 2 / a["STEPS"]), parts),
        },
        longest={"moved": 2.0, "first": (float(-(-a["samples"] // a["STEPS"])), parts)},
    )


MODELS = {"count_labels_kernel": _count, "draw_samples_kernel": _draw}
KERNELS = tuple(MODELS)
TARGETS = (
    ModelTarget("256 of 2 x 268,569 anchors", KERNELS, 12),
    ModelTarget("512 of 2 x 2,100 proposals", KERNELS, 12),
)
