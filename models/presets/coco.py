"""Instance segmentation and object detection on COCO (§4, tables 1 to 3)."""

from __future__ import annotations

from dataclasses import replace

from models.config import C4, AverageBox, FCNMask, ModelConfig, RPNConfig, SamplingConfig, TrainConfig

_FPN = ModelConfig()
_C4 = ModelConfig(
    features=C4(),
    rpn=RPNConfig(
        pre_nms_top_k_train=12_000,  # Detectron, which kept 2000 proposals in training
        pre_nms_top_k=6000,
        proposals=300,  # §3.1
    ),
    sampling=SamplingConfig(rois_per_image=64),  # §3.1
    box=AverageBox(),  # figure 4 (left)
    mask=FCNMask(resolution=7, convs=0),
)


def _train(model: ModelConfig, **backbone: int) -> TrainConfig:
    return TrainConfig(model=replace(model, backbone=replace(model.backbone, **backbone)))


def _one_image(config: TrainConfig) -> TrainConfig:
    """One image on each GPU (§3.1), for which the learning rate is scaled to 0.01."""
    return replace(config, solver=replace(config.solver, images_per_gpu=1))


COCO: dict[str, TrainConfig] = {
    "R-18-FPN": _train(_FPN, depth=18),
    "R-34-FPN": _train(_FPN, depth=34),
    "R-50-FPN": _train(_FPN),  # table 2
    "R-101-FPN": _train(_FPN, depth=101),  # table 1
    "X-101-FPN": _one_image(_train(_FPN, depth=101, groups=64, width_per_group=4)),  # table 1
    "X-101-32x8d-FPN": _one_image(_train(_FPN, depth=101, groups=32, width_per_group=8)),
    "R-50-C4": _train(_C4),  # table 2
    "R-101-C4": _train(_C4, depth=101),  # table 1
    "R-50-FPN-box": _train(replace(_FPN, mask=None)),  # table 3: Faster R-CNN, RoIAlign
    "R-101-FPN-box": _train(replace(_FPN, mask=None), depth=101),
}
