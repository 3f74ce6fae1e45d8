"""Configuration of a Mask R-CNN and of its training.

The defaults are the paper's (He et al. 2017; "§", "table" and "appendix" refer to it). Where the paper gives no value,
the default is that of Faster R-CNN (Ren et al. 2015), FPN (Lin et al. 2017) or the authors' Detectron, and the comment
names the source. Where a detector can be built in several ways, a field is a union of dataclasses, one for each way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

Norm = Literal["none", "batch"]


@dataclass(frozen=True)
class InputConfig:
    """Preprocessing of images."""

    min_size: int = 800  # §3.1: length of the shorter side, in pixels
    max_size: int = 1333  # Detectron: largest length of the longer side, in pixels
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # ImageNet, 0..255, in the order of `channels`
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channels: Literal["RGB", "BGR"] = "RGB"  # BGR for Detectron's weights
    divisor: int = 32  # padded heights and widths are multiples of this


@dataclass(frozen=True)
class BackboneConfig:
    """ResNet (He et al. 2016) or ResNeXt (Xie et al. 2017), with torchvision's layers and names."""

    depth: Literal[18, 34, 50, 101] = 50
    groups: int = 1
    width_per_group: int = 64
    norm: Literal["frozen", "batch"] = "frozen"  # Detectron: statistics, scale and shift stay those of ImageNet
    norm_eps: float = 1e-5
    frozen_stages: int = 2  # Detectron: the stem and res2 are not trained
    stride_in_1x1: bool = False  # whether bottlenecks stride in the 1x1 convolution (original ResNet) or in the 3x3


@dataclass(frozen=True)
class FPN:
    """Feature pyramid network (Lin et al. 2017): the RPN reads P2..P6, and each region is pooled from one of P2..P5."""

    channels: int = 256
    norm: Norm = "none"
    canonical_box_size: int = 224  # FPN, equation 1: a box of this side, in pixels, is pooled from P4
    level_rounding: Literal["torchvision", "detectron2"] = "detectron2"  # see `fastmask.multiscale_roi_align`


@dataclass(frozen=True)
class C4:
    """One feature map, that of res4; res5 is applied to each region (figure 4, left)."""

    res5_stride: int = 1  # figure 4 (left): 7x7 stays 7x7; detectron2 pools 14x14 and has a stride of 2


@dataclass(frozen=True)
class AnchorConfig:
    """Anchors of the RPN."""

    sizes: tuple[float, ...] = (32, 64, 128, 256, 512)  # §3.1: 5 scales; a level of an FPN has one, a C4 has all
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # §3.1: 3 ratios, height / width
    rounded: bool = False  # whether corners and strides are rounded to whole pixels, as in torchvision


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
    pre_nms_top_k_train: int = 2000  # Detectron: for each level, in training
    pre_nms_top_k: int = 1000  # and in inference
    proposals_train: int = 2000  # Detectron: for each image, over all levels, in training
    proposals: int = 1000  # §3.1: in inference, 1000 with an FPN and 300 with a C4
    nms_iou: float = 0.7
    min_box_size: float = 1e-3  # pixels: boxes that are smaller after clipping are dropped


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling of the proposals that the heads are trained on."""

    rois_per_image: int = 512  # §3.1: 512 with an FPN, 64 with a C4
    positive_fraction: float = 0.25  # §3.1: one positive to three negatives
    positive_iou: float = 0.5  # §3.1
    crowd_overlap: float = 0.7  # Detectron: a negative with this fraction of its area in a crowd region is ignored


@dataclass(frozen=True)
class RoIAlign:
    """Pooling of a region's features (§3)."""

    sampling_ratio: int = 2  # §3: 2x2 points in each bin; 0: ceil(bin size) along each axis
    aligned: bool = True  # whether pixel centres are at half pixels; not so in torchvision and the first RoIAlign


@dataclass(frozen=True)
class BoxHeadConfig:
    """Settings that `FCBox` and `AverageBox` share."""

    resolution: int = 7  # figure 4: bins of the pooling
    delta_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)  # Fast R-CNN: factors of the deltas
    smooth_l1_beta: float = 1 / 9
    score_threshold: float = 0.05  # Fast R-CNN
    nms_iou: float = 0.5  # appendix B
    min_box_size: float = 1e-2  # pixels: boxes that are smaller after clipping are dropped
    detections: int = 100  # §3.1: the 100 highest-scoring of each image


@dataclass(frozen=True)
class FCBox(BoxHeadConfig):
    """A box head of convolutions and then fully connected layers over the whole region (figure 4, right)."""

    convs: int = 0
    conv_channels: int = 256
    fcs: int = 2
    fc_channels: int = 1024
    norm: Norm = "none"


@dataclass(frozen=True)
class AverageBox(BoxHeadConfig):
    """A box head that averages the region's features, those of res5 on a C4 (figure 4, left)."""


@dataclass(frozen=True)
class FCNMask:
    """A fully convolutional mask head with one mask, under a sigmoid, for each class (§3, figure 4)."""

    resolution: int = 14  # figure 4: bins of the pooling; the mask has twice as many pixels along each axis
    convs: int = 4  # figure 4 (right); figure 4 (left) has none
    channels: int = 256
    norm: Norm = "none"
    paste: Literal["aligned", "torchvision"] = "aligned"  # the convention of `fastmask.paste_masks`


@dataclass(frozen=True)
class KeypointHeadConfig:
    """A head that predicts each keypoint as a one-hot mask of 56 x 56 (§5)."""

    keypoints: int = 17  # COCO's person
    resolution: int = 14
    convs: int = 8  # §5
    channels: int = 512  # §5


@dataclass(frozen=True)
class ModelConfig:
    """A detector. It has no mask branch if `mask` is None, and no keypoint branch if `keypoint` is None."""

    classes: int = 80  # COCO; without the background
    input: InputConfig = InputConfig()
    backbone: BackboneConfig = BackboneConfig()
    features: FPN | C4 = FPN()
    rpn: RPNConfig = RPNConfig()
    sampling: SamplingConfig = SamplingConfig()
    pooling: RoIAlign = RoIAlign()
    box: FCBox | AverageBox = FCBox()
    mask: FCNMask | None = FCNMask()
    keypoint: KeypointHeadConfig | None = None


@dataclass(frozen=True)
class DataConfig:
    """COCO's own layout: `root/annotations/<annotations>_<split>.json` beside `root/<split>/*.jpg`."""

    root: Path | None = None  # if None, shapes are generated into ./runs/shapes
    annotations: str = "instances"  # or person_keypoints, for keypoints
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
    lr: float = 0.02  # §3.1, for 16 images in a step; other numbers of images scale it in proportion
    momentum: float = 0.9  # §3.1
    weight_decay: float = 1e-4  # §3.1
    steps: tuple[int, ...] = (120_000,)  # §3.1: at each of these iterations, lr is multiplied by gamma
    gamma: float = 0.1  # §3.1
    warmup: int = 500  # Detectron: iterations in which lr grows linearly to its full value
    warmup_factor: float = 1 / 3  # the fraction of lr at the first iteration
    accumulate: int = 1  # mini-batches in a step; their gradients are averaged
    amp: bool = True  # bfloat16 on CUDA; the CPU stays in float32
    deterministic: bool = False  # bit-for-bit reproducible on CUDA too, as training on the CPU always is
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
    on_error: Literal["raise", "skip"] = "raise"  # stop at a bad image or annotation, or leave it out and count it
    weights: str | None = "imagenet"  # initial weights: "imagenet" for torchvision's backbone, a file, or None
    resume: bool = False  # continue from `output`/last.pth, to the same bits as an uninterrupted run


KIND = "kind"  # the key under which a stored union names its dataclass


def config_values(config: Any) -> dict[str, Any]:
    """Convert a config to nested dictionaries for JSON. For a member of a union, `"kind"` holds the dataclass's name.

    Args:
        config: an instance of one of this module's dataclasses.

    Returns:
        The value of each field by its name. Paths and tuples are not converted.
    """
    types = get_type_hints(type(config))
    values = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            kind = {KIND: type(value).__name__} if get_args(types[entry.name]) else {}
            value = kind | config_values(value)
        values[entry.name] = value
    return values


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Build a config from the values that `config_values` returned for it. Lists, as read from JSON, become tuples.

    Args:
        values: by field name. Fields that are missing have their defaults.

    Raises:
        ValueError: a field or the kind of a union is unknown, for instance because another version wrote it.
    """
    return _build(ModelConfig, values)


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    types = get_type_hints(cls)
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{cls.__name__}: expected fields {sorted(types)}, got {unknown}")
    return cls(**{name: _convert(name, types[name], value) for name, value in values.items()})


def _convert(name: str, annotation: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return tuple(value) if isinstance(value, list) else value
    if isinstance(annotation, type):
        return _build(annotation, value)
    kinds = {kind.__name__: kind for kind in get_args(annotation) if isinstance(kind, type) and is_dataclass(kind)}
    if (kind := value.get(KIND)) not in kinds:
        raise ValueError(f"{name}: expected a {KIND} of {sorted(kinds)}, got {kind!r}")
    return _build(kinds[kind], {key: entry for key, entry in value.items() if key != KIND})
