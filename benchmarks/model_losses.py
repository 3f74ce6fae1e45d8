"""The static model of the mask loss and the keypoint loss, whose last step is one kernel."""

from __future__ import annotations

from benchmarks.harness.operators import Backend, Launch, Limit, ModelTarget, Work

SECTOR = 32

REDUCE_LIMIT: dict[Backend, Limit] = {"cuda": Limit(32), "hip": Limit(16)}


def _reduce(launch: Launch) -> Work:
    a = launch.arguments
    read = a["size"] * 8
    return Work(hbm_bytes=read, l2_bytes=read, trips={"start": float(-(-a["size"] // a["BLOCK"]))})


def _mask_forward(launch: Launch) -> Work:
    a = launch.arguments
    rows, pixels, size = launch.programs, a["PIXELS"], a["logits"].itemsize
    step = a["K"] * size if a["CHANNELS_LAST"] else size
    read = rows * pixels * min(step, SECTOR)  # a sector for each pixel, unless several pixels share one
    moved = read + a["targets"].nbytes + a["residuals"].nbytes + rows * (8 + 1 + 8)
    return Work(hbm_bytes=moved, l2_bytes=moved, trips=_steps(pixels, a["STEP"]))


def _steps(pixels: int, step: int) -> dict[str, float]:
    return {"start": float(-(-pixels // step))} if pixels > step else {}


def _mask_backward(launch: Launch) -> Work:
    a = launch.arguments
    moved = a["residuals"].nbytes + a["output"].nbytes
    return Work(hbm_bytes=moved, l2_bytes=moved + launch.programs * SECTOR * 3)


def _keypoint_forward(launch: Launch) -> Work:
    a = launch.arguments
    moved = a["heatmaps"].nbytes + a["targets"].nbytes + a["lse"].nbytes
    return Work(hbm_bytes=moved, l2_bytes=moved, trips=_steps(a["PIXELS"], a["STEP"]))


def _keypoint_backward(launch: Launch) -> Work:
    a = launch.arguments
    moved = a["heatmaps"].nbytes + a["output"].nbytes
    return Work(hbm_bytes=moved, l2_bytes=moved + launch.programs * SECTOR * 4)


MASK_MODELS = {
    "_mask_loss_kernel": _mask_forward,
    "_mask_loss_backward_kernel": _mask_backward,
    "_reduce_loss_kernel": _reduce,
}
MASK_TARGETS = (ModelTarget("256 RoIs 28x28, 80 classes, bfloat16", tuple(MASK_MODELS), 25),)
KEYPOINT_MODELS = {
    "_keypoint_loss_kernel": _keypoint_forward,
    "_keypoint_loss_backward_kernel": _keypoint_backward,
    "_reduce_loss_kernel": _reduce,
}
KEYPOINT_TARGETS = (
    ModelTarget("128 RoIs 17x56x56, NCHW, float32", tuple(KEYPOINT_MODELS), 40),
    ModelTarget("128 RoIs 17x56x56, channels_last, float32", tuple(KEYPOINT_MODELS), 50),
)
