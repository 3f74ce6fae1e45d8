"""Human pose estimation on COCO (§5, table 4)."""

from __future__ import annotations

from models.config import (
    BackboneConfig,
    DataConfig,
    FCNMask,
    KeypointHeadConfig,
    ModelConfig,
    SolverConfig,
    TrainConfig,
)


def _person(backbone: BackboneConfig, mask: FCNMask | None) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(classes=1, backbone=backbone, mask=mask, keypoint=KeypointHeadConfig()),
        data=DataConfig(annotations="person_keypoints", train_min_sizes=(640, 672, 704, 736, 768, 800)),  # §5
        solver=SolverConfig(iterations=90_000, steps=(60_000, 80_000)),  # §5
    )


KEYPOINTS: dict[str, TrainConfig] = {
    "R-50-FPN-keypoint": _person(BackboneConfig(depth=50), mask=None),  # table 4: keypoint-only
    "R-101-FPN-keypoint": _person(BackboneConfig(depth=101), mask=None),
    "R-50-FPN-mask-keypoint": _person(BackboneConfig(depth=50), mask=FCNMask()),  # table 4: keypoint & mask
}
