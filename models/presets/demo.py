"""A small model of generated shapes for `make demo`."""

from __future__ import annotations

from models.config import (
    FPN,
    AnchorConfig,
    BackboneConfig,
    DataConfig,
    FCBox,
    FCNMask,
    InputConfig,
    ModelConfig,
    RPNConfig,
    SamplingConfig,
    SolverConfig,
    TrainConfig,
)

# Trained from scratch within minutes on two cores: small images, few channels, batch norm in every part that has it
DEMO: dict[str, TrainConfig] = {
    "demo": TrainConfig(
        model=ModelConfig(
            input=InputConfig(min_size=128, max_size=176),
            backbone=BackboneConfig(depth=18, norm="batch", frozen_stages=0),
            features=FPN(channels=64, norm="batch", canonical_box_size=112),
            rpn=RPNConfig(
                anchors=AnchorConfig(sizes=(12, 24, 48, 96, 192)),
                pre_nms_top_k_train=300,
                pre_nms_top_k=200,
                proposals_train=300,
                proposals=150,
            ),
            sampling=SamplingConfig(rois_per_image=64),
            box=FCBox(convs=1, conv_channels=64, fcs=1, fc_channels=256, norm="batch", detections=50),
            mask=FCNMask(convs=2, channels=64, norm="batch"),
        ),
        data=DataConfig(train_min_sizes=(112, 128, 144), workers=1),
        solver=SolverConfig(
            iterations=800,
            images_per_gpu=4,
            lr=0.3,
            steps=(540, 670, 750),
            gamma=0.3,
            warmup=50,
            clip_norm=10.0,
            evaluate_every=800,
            checkpoint_every=400,
        ),
        weights=None,
    ),
}
