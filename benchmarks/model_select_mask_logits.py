"""The static model of `select_mask_logits`: every feature is read once."""

from __future__ import annotations

from benchmarks.harness.operators import Launch, ModelTarget, Work


def _select(launch: Launch) -> Work:
    a = launch.arguments
    moved = a["features"].nbytes + a["output"].nbytes + a["weight"].nbytes
    steps = -(-a["C"] // a["STEP_CHANNELS"])
    return Work(
        hbm_bytes=moved,
        l2_bytes=moved + launch.programs * a["C"] * a["weight"].itemsize,
        trips={} if a["features"].itemsize == 4 else {"start": float(steps)},  # float32's eight steps are unrolled
        branches={"if (label >= 1)": 1.0},
    )


MODELS = {"_select_mask_logits_kernel": _select}
TARGETS = (ModelTarget("100 RoIs 28x28, 256 channels, bfloat16", ("_select_mask_logits_kernel",), 16),)
