"""What a Mask R-CNN and its training are made of.

Defaults are the paper's (He et al. 2017, "§" and "appendix") and cite their place; where it is silent, they are
those of Faster R-CNN (Ren et al. 2015), FPN (Lin et al. 2017) or the authors' Detectron, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

Norm = Literal["none", "batch"]


@dataclass(frozen=True)
class InputConfig:
    """From a picture's bytes to what the backbone reads."""

    min_size: int = 800  # §3.1: the shorter edge, in pixels
    max_size: int = 1333  # Detectron: the longer edge at most
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # ImageNet, of 0..255, in `channels`' order
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channels: Literal["RGB", "BGR"] = "RGB"  # BGR in Detectron's weights
    divisor: int = 32  # padded to a multiple of the coarsest stride


@dataclass(frozen=True)
class BackboneConfig:
    """ResNet (He et al. 2016) or ResNeXt (Xie et al. 2017), as torchvision builds and names them."""

    depth: Literal[18, 34, 50, 101] = 50
    groups: int = 1
    width_per_group: int = 64
    norm: Literal["frozen", "batch"] = "frozen"  # Detectron: statistics of ImageNet, never updated
    norm_eps: float = 1e-5
    frozen_stages: int = 2  # Detectron: the stem and res2 stay as they were on ImageNet
    stride_in_1x1: bool = False  # where a bottleneck strides: the original ResNet's 1x1, or torchvision's 3x3


@dataclass(frozen=True)
class FPNConfig:
    """Feature pyramid (Lin et al. 2017)."""

    channels: int = 256
    norm: Norm = "none"


@dataclass(frozen=True)
class AnchorConfig:
    sizes: tuple[float, ...] = (32, 64, 128, 256, 512)  # §3.1: 5 scales; one per level with an FPN, all on a C4
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # §3.1: 3 ratios, height / width
    rounded: bool = False  # corners rounded to whole pixels, as torchvision's weights were trained


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network (Ren et al. 2015)."""

    anchors: AnchorConfig = AnchorConfig()
    convs: int = 1
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    samples_per_image: int = 256
    positive_fraction: float = 0.5
    smooth_l1_beta: float = 1 / 9
    pre_nms_top_k_train: int = 2000  # Detectron: per level
    pre_nms_top_k: int = 1000
    proposals_train: int = 2000  # Detectron: over all levels
    proposals: int = 1000  # §3.1: 1000 with an FPN, 300 with a C4
    nms_iou: float = 0.7
    min_box_size: float = 1e-3  # pixels: what clipping leaves thinner is no proposal


@dataclass(frozen=True)
class SamplingConfig:
    """Which proposals the heads learn from."""

    rois_per_image: int = 512  # §3.1: 512 with an FPN, 64 with a C4
    positive_fraction: float = 0.25  # §3.1: 1:3
    positive_iou: float = 0.5  # §3.1
    crowd_overlap: float = 0.7  # Detectron: a negative that lies in a crowd by this part of its area is not sampled


@dataclass(frozen=True)
class PoolingConfig:
    """RoIAlign (§3)."""

    sampling_ratio: int = 2  # §3: four points in each bin; 0 samples by the size of the bin
    aligned: bool = True  # pixel centres at half pixels; False is the first version's, as in torchvision
    canonical_box_size: int = 224  # FPN, equation 1: a box of this side, in pixels, is pooled from P4
    level_rounding: Literal["torchvision", "detectron2"] = "detectron2"


@dataclass(frozen=True)
class BoxHeadConfig:
    """Classes and boxes. `res5` is the head of Figure 4 (left), the fully connected one that of Figure 4 (right)."""

    resolution: int = 7  # figure 4
    convs: int = 0
    conv_channels: int = 256
    fcs: int = 2  # figure 4 (right); 0 with a C4, whose res5 takes their place
    fc_channels: int = 1024
    norm: Norm = "none"
    res5_stride: int = 1  # figure 4 (left): 7x7 stays 7x7; detectron2 pools 14x14 and strides by 2
    delta_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)  # Fast R-CNN's normalised targets
    smooth_l1_beta: float = 1 / 9
    score_threshold: float = 0.05  # Fast R-CNN
    nms_iou: float = 0.5  # appendix B
    min_box_size: float = 1e-2  # pixels
    detections: int = 100  # §3.1: the best 100


@dataclass(frozen=True)
class MaskHeadConfig:
    """Masks, one per class, each of its own sigmoid (§3)."""

    resolution: int = 14  # figure 4; the mask has twice as many pixels a side
    convs: int = 4  # figure 4 (right); 0 with a C4
    channels: int = 256
    norm: Norm = "none"
    paste: Literal["aligned", "torchvision"] = "aligned"  # how a mask is stretched over its box


@dataclass(frozen=True)
class KeypointHeadConfig:
    """Keypoints as one-hot masks of 56 x 56 (§5)."""

    keypoints: int = 17  # COCO's person
    resolution: int = 14
    convs: int = 8  # §5
    channels: int = 512  # §5


@dataclass(frozen=True)
class ModelConfig:
    """A detector; `fpn=None` is the C4 variant, `mask=None` and `keypoint=None` leave those branches out."""

    classes: int = 80  # COCO; the background not counted
    input: InputConfig = InputConfig()
    backbone: BackboneConfig = BackboneConfig()
    fpn: FPNConfig | None = FPNConfig()
    rpn: RPNConfig = RPNConfig()
    sampling: SamplingConfig = SamplingConfig()
    pooling: PoolingConfig = PoolingConfig()
    box: BoxHeadConfig = BoxHeadConfig()
    mask: MaskHeadConfig | None = MaskHeadConfig()
    keypoint: KeypointHeadConfig | None = None


@dataclass(frozen=True)
class DataConfig:
    """COCO's own layout: `root/annotations/<annotations>_<split>.json` beside `root/<split>/*.jpg`."""

    root: Path | None = None  # none: shapes are generated into ./runs/shapes
    annotations: str = "instances"  # or person_keypoints, which has the keypoints
    train: str = "train2017"
    val: str = "val2017"
    train_min_sizes: tuple[int, ...] = (800,)  # §3.1; appendix B draws one of 640..800 for each image
    flip: float = 0.5  # probability of a horizontal flip
    workers: int = 2


@dataclass(frozen=True)
class SolverConfig:
    """Stochastic gradient descent (§3.1)."""

    iterations: int = 160_000  # §3.1
    images_per_gpu: int = 2  # §3.1: 8 GPUs make the mini-batch of 16
    lr: float = 0.02  # §3.1, for 16 images in a step; scaled in proportion to the number of images
    momentum: float = 0.9  # §3.1
    weight_decay: float = 1e-4  # §3.1
    steps: tuple[int, ...] = (120_000,)  # §3.1: iterations from which lr is multiplied by gamma once more
    gamma: float = 0.1  # §3.1
    warmup: int = 500  # Detectron: iterations of linear growth up to lr
    warmup_factor: float = 1 / 3  # of lr, at the first iteration
    accumulate: int = 1  # mini-batches in a step, whose gradients are averaged
    amp: bool = True  # bfloat16 on CUDA; the CPU stays in float32
    deterministic: bool = False  # the same bits in every run on CUDA too, as always on the CPU
    clip_norm: float | None = None  # maximum norm of the gradient; the paper does not clip
    seed: int = 0
    evaluate_every: int = 10_000  # iterations
    checkpoint_every: int = 1000
    log_every: int = 20


@dataclass(frozen=True)
class TrainConfig:
    """The settings of `python -m models.train`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    solver: SolverConfig = SolverConfig()
    output: Path = Path("runs/train")  # checkpoints, logs and results
    on_error: Literal["raise", "skip"] = "raise"  # a bad image or annotation stops, or is counted and left out
    weights: str | None = "imagenet"  # initial ones: "imagenet" for torchvision's backbone, a file, or none
    resume: bool = False  # continue from the last checkpoint in `output`, bit for bit


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict`, also after JSON, whose lists are tuples here.

    Raises:
        ValueError: a field is unknown: the file is from another version.
    """
    return _build(ModelConfig, values)


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    types = get_type_hints(kind)
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{kind.__name__}: expected fields {sorted(types)}, got {unknown}")
    return kind(**{name: _convert(types[name], value) for name, value in values.items()})


def _convert(annotation: Any, value: Any) -> Any:
    nested = [kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)]
    if nested and value is not None:
        return _build(nested[0], value)
    return tuple(value) if isinstance(value, list) else value
