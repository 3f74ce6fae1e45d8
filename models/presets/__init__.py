"""The paper's models under the paper's names, and a small one for `make demo`."""

from __future__ import annotations

from dataclasses import replace

from models.config import (
    AnchorConfig,
    BackboneConfig,
    BoxHeadConfig,
    DataConfig,
    FPNConfig,
    InputConfig,
    KeypointHeadConfig,
    MaskHeadConfig,
    ModelConfig,
    PoolingConfig,
    RPNConfig,
    SamplingConfig,
    SolverConfig,
    TrainConfig,
)

_FPN = ModelConfig()
_C4 = replace(
    _FPN,
    fpn=None,
    rpn=RPNConfig(
        pre_nms_top_k_train=12_000,  # Detectron, which kept 2000 proposals in training
        pre_nms_top_k=6000,
        proposals=300,  # §3.1
    ),
    sampling=SamplingConfig(rois_per_image=64),  # §3.1
    box=BoxHeadConfig(fcs=0),  # figure 4 (left)
    mask=MaskHeadConfig(resolution=7, convs=0),
)
_COCO = TrainConfig()
_KEYPOINT_DATA = DataConfig(annotations="person_keypoints", train_min_sizes=(640, 672, 704, 736, 768, 800))  # §5
_KEYPOINT_SOLVER = SolverConfig(iterations=90_000, steps=(60_000, 80_000))  # §5


def _train(model: ModelConfig, **backbone: int) -> TrainConfig:
    return replace(_COCO, model=replace(model, backbone=replace(model.backbone, **backbone)))


def _person(depth: int, *, masks: bool) -> TrainConfig:
    model = replace(_FPN, classes=1, mask=_FPN.mask if masks else None, keypoint=KeypointHeadConfig())
    return replace(_train(model, depth=depth), data=_KEYPOINT_DATA, solver=_KEYPOINT_SOLVER)


_X_101 = replace(_COCO.solver, images_per_gpu=1)  # §3.1: lr 0.01, which is the scaled one

PRESETS: dict[str, TrainConfig] = {
    "R-18-FPN": _train(_FPN, depth=18),
    "R-34-FPN": _train(_FPN, depth=34),
    "R-50-FPN": _train(_FPN),  # table 2
    "R-101-FPN": _train(_FPN, depth=101),  # table 1
    "X-101-FPN": replace(_train(_FPN, depth=101, groups=64, width_per_group=4), solver=_X_101),  # table 1
    "X-101-32x8d-FPN": replace(_train(_FPN, depth=101, groups=32, width_per_group=8), solver=_X_101),
    "R-50-C4": _train(_C4),  # table 2
    "R-101-C4": _train(_C4, depth=101),  # table 1
    "R-50-FPN-box": _train(replace(_FPN, mask=None)),  # table 3: Faster R-CNN, RoIAlign
    "R-101-FPN-box": _train(replace(_FPN, mask=None), depth=101),
    "R-50-FPN-keypoint": _person(50, masks=False),  # table 4: keypoint-only
    "R-101-FPN-keypoint": _person(101, masks=False),
    "R-50-FPN-mask-keypoint": _person(50, masks=True),  # table 4: keypoint & mask
    # From scratch in some minutes on two cores: small pictures, few channels, batch norm wherever there is a place.
    "demo": TrainConfig(
        model=ModelConfig(
            input=InputConfig(min_size=128, max_size=176),
            backbone=BackboneConfig(depth=18, norm="batch", frozen_stages=0),
            fpn=FPNConfig(channels=64, norm="batch"),
            rpn=RPNConfig(
                anchors=AnchorConfig(sizes=(12, 24, 48, 96, 192)),
                pre_nms_top_k_train=300,
                pre_nms_top_k=200,
                proposals_train=300,
                proposals=150,
            ),
            sampling=SamplingConfig(rois_per_image=64),
            pooling=PoolingConfig(canonical_box_size=112),
            box=BoxHeadConfig(convs=1, conv_channels=64, fcs=1, fc_channels=256, norm="batch", detections=50),
            mask=MaskHeadConfig(convs=2, channels=64, norm="batch"),
        ),
        data=DataConfig(train_min_sizes=(112, 128, 144), workers=1),
        solver=SolverConfig(
            iterations=850,
            images_per_gpu=4,
            lr=0.3,
            steps=(600, 720, 800),
            gamma=0.3,
            warmup=50,
            clip_norm=10.0,
            evaluate_every=850,
            checkpoint_every=400,
        ),
        weights=None,
    ),
}
