"""RoIAlign over P2 to P5, for boxes and for masks (He et al. 2017, §3), and over the feature map of a C4.

K RoIs, C channels, P bins along an axis, S samples along an axis of a bin. Bytes: the pixels of the features that some
RoI covers, read (forward), or the gradients of the features, written whole (backward); the boxes; K * C * P^2 outputs.
FLOPs: a multiply-add for each of the four neighbours of K * C * (P * S)^2 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import pytest
import torch
import torchvision
from torch import Tensor
from torch.testing import assert_close

import fastmask
from benchmarks import model_roi_align
from benchmarks.harness.checks import parameters
from benchmarks.harness.comparison import CaseOptions, Comparison, Target
from benchmarks.harness.machine import PEERS, peer
from benchmarks.harness.operators import Call, Draw, Operator, meta
from benchmarks.harness.pooling import (
    DIRECTIONS,
    Direction,
    Inputs,
    Pool,
    c4_inputs,
    compare_passes,
    torchvision_ops,
    torchvision_provider,
)
from benchmarks.harness.workloads import (
    ADVERSARIAL,
    C4,
    CHANNELS,
    DTYPES,
    IMAGE,
    LAYOUTS,
    STRIDES,
    objects,
    pyramid,
)
from benchmarks.reporting.results import FASTMASK
from fastmask.kernels.roi_align.op import RoIAlignSpec
from fastmask.kernels.roi_align.reference import roi_align_reference
from tests.oracles import roi_align_backward, roi_align_box_gradient, roi_align_forward
from tests.oracles.roi_align import check_large_map, draw_boxes, draw_pyramid

SAMPLES = 2  # torchvision's default
SCALES = [1 / stride for stride in STRIDES]
NAMES = [str(level) for level in range(len(STRIDES))]


@dataclass(frozen=True)
class Workload:
    """The number of RoIs of each image, and the number of bins along an axis of a RoI."""

    images: int
    rois: int
    bins: int


BOXES, TRAINING, MASKS = "1000 RoIs 7x7", "2 x 512 RoIs 7x7", "100 RoIs 14x14"
WORKLOADS = {
    BOXES: Workload(images=1, rois=1000, bins=7),
    TRAINING: Workload(images=2, rois=512, bins=7),
    MASKS: Workload(images=1, rois=100, bins=14),
}

TARGETS: dict[tuple[str, ...], Target] = {  # times as fast as torchvision, on a GPU under autocast
    ("forward", BOXES, "float32", "NCHW"): {"cpu": 3},
    ("forward + backward", BOXES, "float32", "NCHW"): {"cpu": 5},
    ("forward", BOXES, "bfloat16", "channels_last"): {"gpu": 8},
    ("backward", BOXES, "bfloat16", "channels_last"): {"gpu": 3},
}


def compare_on_pyramid(
    comparison: Comparison,
    name: str,
    direction: Direction,
    inputs: Inputs,
    *,
    bins: int,
    image: tuple[int, int] = IMAGE,
    compiled: bool = False,
    **options: Unpack[CaseOptions],
) -> None:
    """Compare over P2 to P5.

    Args:
        comparison: the fixture.
        name: the case's name, without the direction.
        direction: what is timed.
        inputs: from `pyramid_inputs`.
        bins: the number of bins along an axis of a RoI.
        image: (height, width) of the images.
        compiled: also compare with torch.compile of fastmask's reference, for one image.
        options: see `CaseOptions`.
    """
    features, boxes = list(inputs.features), list(inputs.boxes)
    named, images = dict(zip(NAMES, features, strict=True)), [image] * len(boxes)
    pool = fastmask.MultiScaleRoIAlign(NAMES, bins, SAMPLES)
    torchvision_pool = torchvision.ops.MultiScaleRoIAlign(NAMES, bins, SAMPLES)
    pools: dict[str, Pool] = {
        FASTMASK: lambda: pool(named, boxes, images),
        torchvision_provider(inputs.dtype): lambda: torchvision_pool(named, boxes, images),
    }
    if (poolers := peer("detectron2.modeling.poolers")) and (structures := peer("detectron2.structures")):
        pooler = poolers.ROIPooler(bins, SCALES, SAMPLES, "ROIAlign")
        wrapped = [structures.Boxes(box) for box in boxes]
        pools["detectron2"] = lambda: pooler(features, wrapped)
    if compiled:
        pools["torch.compile"] = compiled_reference(inputs, bins)
    _compare(comparison, name, direction, pools, inputs, bins=bins, **options)


def pyramid_inputs(
    device: str,
    boxes: Sequence[Tensor],
    dtype: str,
    layout: str = "channels_last",
    *,
    image: tuple[int, int] = IMAGE,
) -> Inputs:
    """P2 to P5, and `[K, 4]` boxes for each image."""
    features = pyramid(device, DTYPES[dtype], LAYOUTS[layout], images=len(boxes), image=image)
    return Inputs(features, [box.to(device) for box in boxes], STRIDES)


def compiled_reference(inputs: Inputs, bins: int) -> Pool:
    """torch.compile of fastmask's reference, with torchvision's settings, on the boxes of one image."""
    features, (boxes,) = list(inputs.features), inputs.boxes
    rois = torch.nn.functional.pad(boxes, (1, 0))
    reference = torch.compile(roi_align_reference)
    spec = RoIAlignSpec(bins, bins, SCALES, SAMPLES, aligned=False, reduction="mean")
    return lambda: reference(features, rois, spec)[0]


def _compare(
    comparison: Comparison,
    name: str,
    direction: Direction,
    pools: dict[str, Pool],
    inputs: Inputs,
    *,
    bins: int,
    **options: Unpack[CaseOptions],
) -> None:
    feature = inputs.features[0]
    outputs = sum(map(len, inputs.boxes)) * feature.shape[1] * bins**2
    bytes = inputs.bytes(direction, outputs=outputs * feature.itemsize)
    flops = outputs * SAMPLES**2 * 4 * 2 * (1 + (direction == "forward + backward"))
    compare_passes(comparison, name, direction, pools, inputs, bytes=bytes, flops=flops, **options)


@pytest.mark.parametrize(
    ("workload", "dtype", "layout", "direction"),
    parameters(
        [
            *(
                (workload, dtype, layout, direction)
                for workload in WORKLOADS
                for dtype in DTYPES
                for layout in LAYOUTS
                for direction in DIRECTIONS
            ),
            (BOXES, "float32", "NCHW", "forward + backward"),
        ],
        quick=lambda *row: row[:3] == (MASKS, "float32", "channels_last"),
    ),
)
def bench_pyramid(comparison, workload, dtype, layout, direction):
    shape = WORKLOADS[workload]
    boxes = [objects(shape.rois, seed=image) for image in range(shape.images)]
    compare_on_pyramid(
        comparison,
        f"{workload}, {dtype}, {layout}",
        direction,
        pyramid_inputs(comparison.device, boxes, dtype, layout),
        bins=shape.bins,
        target=TARGETS.get((direction, workload, dtype, layout)),
        compiled=(direction, workload, dtype, layout) == ("forward", BOXES, comparison.main_dtype, "channels_last"),
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_one_map(comparison, direction):
    """The pooling of a C4: 300 RoIs of 14 x 14 on stride 16."""
    bins, scale, dtype = 14, 1 / C4.stride, comparison.main_dtype
    inputs = c4_inputs(comparison.device, objects(300), dtype)
    (feature,), (boxes,) = inputs.features, inputs.boxes
    rois = torch.nn.functional.pad(boxes, (1, 0))
    pools: dict[str, Pool] = {
        FASTMASK: lambda: fastmask.roi_align(feature, rois, bins, scale, SAMPLES),
        torchvision_provider(dtype): lambda: torchvision_ops.roi_align(feature, rois, bins, scale, SAMPLES),
    }
    if detectron2 := peer(PEERS["detectron2"]):
        layer = detectron2.ROIAlign((bins, bins), scale, SAMPLES, aligned=False)
        pools["detectron2"] = lambda: layer(feature, rois)
    if mmcv := peer(PEERS["mmcv"]):
        pools["mmcv"] = lambda: mmcv.roi_align(feature, rois, bins, scale, SAMPLES, "avg", False)
    _compare(comparison, f"300 RoIs 14x14 on a C4, {dtype}, channels_last", direction, pools, inputs, bins=bins)


SAMPLING = {"2 samples": (2, False), "adaptive": (0, True)}  # torchvision's defaults; detectron2's and MMDetection's


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sampling", SAMPLING)
def bench_few_rois(comparison, sampling, direction):
    """20 RoIs of 7 x 7 on P2 alone in NCHW, most of whose pixels no RoI samples."""
    ratio, aligned = SAMPLING[sampling]
    bins, scale, dtype = 7, 1 / STRIDES[0], comparison.main_dtype
    inputs = pyramid_inputs(comparison.device, [objects(20)], dtype, "NCHW")
    feature, (boxes,) = inputs.features[0], inputs.boxes
    rois = torch.nn.functional.pad(boxes, (1, 0))
    pools: dict[str, Pool] = {
        FASTMASK: lambda: fastmask.roi_align(feature, rois, bins, scale, ratio, aligned),
        torchvision_provider(dtype): lambda: torchvision_ops.roi_align(feature, rois, bins, scale, ratio, aligned),
    }
    inputs = Inputs([feature], inputs.boxes, STRIDES[:1])
    _compare(comparison, f"20 RoIs 7x7 on P2, {sampling}, {dtype}, NCHW", direction, pools, inputs, bins=bins)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("boxes", parameters(zip(ADVERSARIAL), quick=lambda boxes: boxes == "all of 2 pixels"))
def bench_adversarial(comparison, boxes, direction):
    inputs = pyramid_inputs(comparison.device, [ADVERSARIAL[boxes](1000)], comparison.main_dtype)
    compare_on_pyramid(comparison, f"1000 RoIs 7x7, {boxes}", direction, inputs, bins=7, kind="adversarial")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rois", parameters(zip([10, 100, 1000, 10_000]), quick=lambda rois: rois <= 100))
def bench_rois(comparison, rois, direction):
    inputs = pyramid_inputs(comparison.device, [objects(rois)], comparison.main_dtype)
    options: CaseOptions = {"kind": "scaling", "axis": f"RoIs, {direction}", "at": rois}
    compare_on_pyramid(comparison, f"{rois:,} RoIs 7x7", direction, inputs, bins=7, **options)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def bench_image_size(comparison, scale):
    height, width = image = (scale * 192, scale * 320)
    boxes = objects(1000, image=image)
    inputs = pyramid_inputs(comparison.device, [boxes], comparison.main_dtype, image=image)
    options: CaseOptions = {"kind": "scaling", "axis": "image, megapixels", "at": height * width / 1e6}
    name = f"1000 RoIs 7x7 on {height} x {width}"
    compare_on_pyramid(comparison, name, "forward", inputs, bins=7, image=image, **options)


def _calls(device: str, seed: int) -> list[Call]:
    features = [level.to(device) for level in draw_pyramid([(6, 7), (3, 4)], images=1, seed=seed)]
    last = [level.to(device, memory_format=torch.channels_last).requires_grad_() for level in features]
    boxes, leaf = (draw_boxes(3, 1, 24, seed).to(device).requires_grad_(of_boxes) for of_boxes in (False, True))
    scales = [1 / 4, 1 / 8]
    pyramid = {"boxes": boxes, "output_size": 2, "spatial_scales": scales, "canonical_box_size": 24}
    return [
        Call(fastmask.roi_align, {"input": last[0], "boxes": [boxes[:, 1:]], "output_size": 2, "sampling_ratio": 2}),
        Call(fastmask.multiscale_roi_align, {"features": last, **pyramid}),
        Call(fastmask.multiscale_roi_align, {"features": features, **pyramid, "sampling_ratio": 0, "reduction": "max"}),
        Call(fastmask.multiscale_roi_align, {"features": last, **pyramid, "boxes": leaf}),
    ]


def _compile_case(
    dtype: str,
    sampling: str,
    images: int,
    boxes: int,
    bins: int,
    reduction: str = "mean",
    *,
    of_features: bool = False,
    of_boxes: bool = False,
    channels: int = CHANNELS,
    channels_last: bool = True,
) -> Call:
    """Box or mask pooling over P2-P5 of 800 x 1344 images, with a peer's defaults, and the gradients asked for."""
    features = [
        meta(images, channels, 800 // stride, 1344 // stride, dtype=DTYPES[dtype], channels_last=channels_last)
        for stride in STRIDES
    ]
    ratio, aligned = {"torchvision": (2, False), "detectron2": (0, True)}[sampling]
    arguments = {
        "features": [feature.requires_grad_(of_features) for feature in features],
        "boxes": meta(boxes, 5).requires_grad_(of_boxes),
        "output_size": bins,
        "spatial_scales": SCALES,
        "sampling_ratio": ratio,
        "aligned": aligned,
        "reduction": reduction,
        "level_rounding": sampling,
    }
    return Call(fastmask.multiscale_roi_align, arguments)


def _check_random(draw: Draw, device: str) -> None:
    """A random call agrees with torchvision."""
    ranges = ((1, 2), (1, 20), (1, 9), (1, 9), (0, 3), (1, 3), (1, 3), (-1, 3))
    n, c, h, w, k, ph, pw, ratio = (draw.integer(low, high) for low, high in ranges)
    aligned, scale = draw.choice([False, True]), draw.choice([1.0, 0.5, 0.3])
    rows = [[draw.integer(0, n - 1), *(draw.number(-20, 40) for _ in range(4))] for _ in range(k)]
    boxes = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    if aligned and ratio <= 0:  # torchvision raises for inverted boxes, whose number of samples is negative
        boxes = torch.cat([boxes[:, :1], boxes[:, 1:].view(-1, 2, 2).sort(1).values.flatten(1)], 1)
    (feature,) = draw_pyramid([(h, w)], images=n, channels=c)
    expected = torchvision_ops.roi_align(feature, boxes, (ph, pw), scale, ratio, aligned)
    actual = fastmask.roi_align(feature.to(device), boxes.to(device), (ph, pw), scale, ratio, aligned)
    assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


OPERATOR = Operator(
    calls=_calls,
    compile_cases={
        f"{boxes} RoIs {bins}x{bins}, {sampling}, {dtype}": partial(
            _compile_case, dtype, sampling, images, boxes, bins, of_features=images == 2
        )
        for sampling in ("torchvision", "detectron2")
        for dtype in ("bfloat16", "float32")
        for images, boxes, bins in ((1, 1000, 7), (1, 100, 14), (2, 1024, 7), (2, 256, 14))
    }
    | {
        f"1024 RoIs 7x7, {sampling}, {reduction}, {dtype}, gradient of boxes": partial(
            _compile_case, dtype, sampling, 2, 1024, 7, reduction, of_boxes=True
        )
        for sampling in ("torchvision", "detectron2")
        for reduction, dtype in (("mean", "bfloat16"), ("mean", "float32"), ("max", "bfloat16"))
    }
    | {
        f"1024 RoIs 7x7, {sampling}, {variant}, {dtype}": partial(
            _compile_case, dtype, sampling, 2, 1024, 7, of_features=True, **options
        )
        for sampling, variant, options in (
            ("torchvision", "max", {"reduction": "max"}),
            ("detectron2", "max", {"reduction": "max"}),
            ("torchvision", "NCHW", {"channels_last": False}),
            ("torchvision", "300 channels", {"channels": 300}),
        )
        for dtype in ("bfloat16", "float32")
    },
    limits=model_roi_align.LIMITS,
    check_random=_check_random,
    check_large=partial(check_large_map, fastmask.roi_align),
    variants=roi_align_forward.VARIANTS | roi_align_backward.VARIANTS | roi_align_box_gradient.VARIANTS,
    models=model_roi_align.MODELS,
    targets=model_roi_align.TARGETS,
)
