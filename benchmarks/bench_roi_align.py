"""RoIAlign over P2 to P5, for boxes and for masks (He et al. 2017, §3), and over the one map of a C4.

K RoIs, C channels, P bins along an axis, S samples along an axis of a bin. Bytes: the pixels of the maps that some RoI
covers, read (forward), or the gradients of the maps, written whole (backward); the boxes; K * C * P^2 outputs. FLOPs: a
multiply-add for each of the four neighbours of K * C * (P * S)^2 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor

import fastmask
from benchmarks.harness.comparison import Race, parameters
from benchmarks.harness.machine import PEERS, peer
from benchmarks.harness.operators import Call, Draw, Limit, Operator, meta
from benchmarks.harness.pooling import DIRECTIONS, DTYPES, LAYOUTS, Pool, race_passes, torchvision_in
from benchmarks.harness.workloads import ADVERSARIAL, C4, IMAGE, STRIDES, c4_map, covered, objects, pyramid
from benchmarks.reporting.results import OURS
from fastmask.kernels.roi_align.op import RoIAlignSpec
from fastmask.kernels.roi_align.reference import roi_align_reference
from tests.oracles.roi_align import check_large_map, draw_boxes, draw_pyramid

SAMPLES = 2  # torchvision's default
SCALES = [1 / stride for stride in STRIDES]
NAMES = [str(level) for level in range(len(STRIDES))]


@dataclass(frozen=True)
class Workload:
    """RoIs of each image, and the bins that each is pooled to."""

    images: int
    rois: int
    bins: int


BOXES, TRAINING, MASKS = "1000 RoIs 7x7", "2 x 512 RoIs 7x7", "100 RoIs 14x14"
WORKLOADS = {
    BOXES: Workload(images=1, rois=1000, bins=7),
    TRAINING: Workload(images=2, rois=512, bins=7),
    MASKS: Workload(images=1, rois=100, bins=14),
}

TARGETS = {  # times as fast as torchvision, on a GPU under autocast
    ("forward", BOXES, "float32", "NCHW"): {"cpu": 3},
    ("forward + backward", BOXES, "float32", "NCHW"): {"cpu": 5},
    ("forward", BOXES, "bfloat16", "channels_last"): {"gpu": 8},
    ("backward", BOXES, "bfloat16", "channels_last"): {"gpu": 3},
}


def race_on_pyramid(
    race: Race,
    direction: str,
    boxes: Sequence[Tensor],
    bins: int,
    name: str,
    *,
    dtype: str | None = None,
    layout: str = "channels_last",
    image: tuple[int, int] = IMAGE,
    compiled: bool = False,
    **options: object,
) -> None:
    """Race over P2 to P5; `compiled`: also what torch.compile makes of our reference, for one image."""
    dtype = dtype or race.main_dtype
    maps = pyramid(race.device, DTYPES[dtype], LAYOUTS[layout], images=len(boxes), image=image)
    boxes = [box.to(race.device) for box in boxes]
    named, images = dict(zip(NAMES, maps, strict=True)), [image] * len(boxes)
    ours = fastmask.MultiScaleRoIAlign(NAMES, bins, SAMPLES)
    theirs = torchvision.ops.MultiScaleRoIAlign(NAMES, bins, SAMPLES)
    pools: dict[str, Pool] = {
        OURS: lambda: ours(named, boxes, images),
        torchvision_in(dtype): lambda: theirs(named, boxes, images),
    }
    if (poolers := peer("detectron2.modeling.poolers")) and (structures := peer("detectron2.structures")):
        pooler = poolers.ROIPooler(bins, SCALES, SAMPLES, "ROIAlign")
        wrapped = [structures.Boxes(box) for box in boxes]
        pools["detectron2"] = lambda: pooler(maps, wrapped)
    if compiled:
        rows = torch.nn.functional.pad(boxes[0], (1, 0))
        reference = torch.compile(roi_align_reference)
        spec = RoIAlignSpec(bins, bins, SCALES, SAMPLES, aligned=False, reduction="mean")
        pools["torch.compile"] = lambda: reference(maps, rows, spec)[0]
    _race(race, direction, name, pools, maps, boxes, bins, STRIDES, **options)


def _race(
    race: Race,
    direction: str,
    name: str,
    pools: dict[str, Pool],
    maps: list[Tensor],
    boxes: Sequence[Tensor],
    bins: int,
    strides: Sequence[int],
    **options: object,
) -> None:
    size, channels = maps[0].itemsize, maps[0].shape[1]
    outputs = sum(map(len, boxes)) * channels * bins**2
    others = outputs * size + sum(box.nbytes for box in boxes)
    read = covered(boxes, [feature.shape[2:] for feature in maps], strides) * channels * size
    written = sum(feature.nbytes for feature in maps)
    bytes = {"forward": read, "backward": written, "forward + backward": read + others + written}[direction] + others
    flops = outputs * SAMPLES**2 * 4 * 2 * (1 + ("+" in direction))
    race_passes(race, f"{direction}, {name}", direction, pools, maps, bytes=bytes, flops=flops, **options)


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
def bench_pyramid(race, workload, dtype, layout, direction):
    shape = WORKLOADS[workload]
    race_on_pyramid(
        race,
        direction,
        [objects(shape.rois, seed=image) for image in range(shape.images)],
        shape.bins,
        f"{workload}, {dtype}, {layout}",
        dtype=dtype,
        layout=layout,
        target=TARGETS.get((direction, workload, dtype, layout)),
        compiled=(direction, workload, dtype, layout) == ("forward", BOXES, race.main_dtype, "channels_last"),
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_one_map(race, direction):
    """The pooling of a C4: 300 RoIs of 14 x 14 on stride 16."""
    bins, scale = 14, 1 / C4.stride
    feature = c4_map(race.device, DTYPES[race.main_dtype], torch.channels_last)
    box = objects(300).to(race.device)
    rows = torch.nn.functional.pad(box, (1, 0))
    pools: dict[str, Pool] = {
        OURS: lambda: fastmask.roi_align(feature, rows, bins, scale, SAMPLES),
        torchvision_in(race.main_dtype): lambda: torchvision.ops.roi_align(feature, rows, bins, scale, SAMPLES),
    }
    if detectron2 := peer(PEERS["detectron2"]):
        layer = detectron2.ROIAlign((bins, bins), scale, SAMPLES, aligned=False)
        pools["detectron2"] = lambda: layer(feature, rows)
    if mmcv := peer(PEERS["mmcv"]):
        pools["mmcv"] = lambda: mmcv.roi_align(feature, rows, bins, scale, SAMPLES, "avg", False)
    name = f"300 RoIs 14x14 on a C4, {race.main_dtype}, channels_last"
    _race(race, direction, name, pools, [feature], [box], bins, [C4.stride])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("boxes", parameters(zip(ADVERSARIAL), quick=lambda boxes: boxes == "all of 2 pixels"))
def bench_adversarial(race, boxes, direction):
    race_on_pyramid(race, direction, [ADVERSARIAL[boxes](1000)], 7, f"1000 RoIs 7x7, {boxes}", kind="adversarial")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rois", parameters(zip([10, 100, 1000, 10_000]), quick=lambda rois: rois <= 100))
def bench_rois(race, rois, direction):
    axis = f"RoIs, {direction}"
    race_on_pyramid(race, direction, [objects(rois)], 7, f"{rois:,} RoIs 7x7", kind="scaling", axis=axis, at=rois)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def bench_image_size(race, scale):
    height, width = image = (scale * 192, scale * 320)
    boxes, name = objects(1000, image=image), f"1000 RoIs 7x7 on {height} x {width}"
    options = {"kind": "scaling", "axis": "image, megapixels", "at": height * width / 1e6}
    race_on_pyramid(race, "forward", [boxes], 7, name, image=image, **options)


def _calls(device: str, seed: int) -> list[Call]:
    features = [level.to(device) for level in draw_pyramid([(6, 7), (3, 4)], images=1, seed=seed)]
    last = [level.to(device, memory_format=torch.channels_last).requires_grad_() for level in features]
    boxes = draw_boxes(3, 1, 24, seed).to(device)
    scales = [1 / 4, 1 / 8]
    pyramid = {"boxes": boxes, "output_size": 2, "spatial_scales": scales, "canonical_box_size": 24}
    return [
        Call(fastmask.roi_align, {"input": last[0], "boxes": [boxes[:, 1:]], "output_size": 2, "sampling_ratio": 2}),
        Call(fastmask.multiscale_roi_align, {"features": last, **pyramid}),
        Call(fastmask.multiscale_roi_align, {"features": features, **pyramid, "sampling_ratio": 0, "reduction": "max"}),
    ]


def _compile_case(dtype: str, sampling: str, images: int, boxes: int, bins: int) -> Call:
    """Box or mask pooling over P2-P5 of an 800 x 1344 image, with a peer's defaults; of two images with gradients."""
    features = [
        meta(images, 256, 800 // stride, 1344 // stride, dtype=DTYPES[dtype], channels_last=True) for stride in STRIDES
    ]
    ratio, aligned = {"torchvision": (2, False), "detectron2": (0, True)}[sampling]
    arguments = {
        "features": [feature.requires_grad_(images == 2) for feature in features],
        "boxes": meta(boxes, 5),
        "output_size": bins,
        "spatial_scales": SCALES,
        "sampling_ratio": ratio,
        "aligned": aligned,
        "level_rounding": sampling,
    }
    return Call(fastmask.multiscale_roi_align, arguments)


def _check_random(draw: Draw, device: str) -> None:
    """A random call is torchvision's."""
    ranges = ((1, 2), (1, 20), (1, 9), (1, 9), (0, 3), (1, 3), (1, 3), (-1, 3))
    n, c, h, w, k, ph, pw, ratio = (draw.integer(low, high) for low, high in ranges)
    aligned, scale = draw.choice([False, True]), draw.choice([1.0, 0.5, 0.3])
    rows = [[draw.integer(0, n - 1), *(draw.number(-20, 40) for _ in range(4))] for _ in range(k)]
    boxes = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    if aligned and ratio <= 0:  # torchvision raises for inverted boxes, whose number of samples is negative
        boxes = torch.cat([boxes[:, :1], boxes[:, 1:].view(-1, 2, 2).sort(1).values.flatten(1)], 1)
    (feature,) = draw_pyramid([(h, w)], images=n, channels=c)
    expected = torchvision.ops.roi_align(feature, boxes, (ph, pw), scale, ratio, aligned)
    actual = fastmask.roi_align(feature.to(device), boxes.to(device), (ph, pw), scale, ratio, aligned)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


OPERATOR = Operator(
    calls=_calls,
    compile_cases={
        f"{boxes} RoIs {bins}x{bins}, {sampling}, {dtype}": partial(_compile_case, dtype, sampling, images, boxes, bins)
        for sampling in ("torchvision", "detectron2")
        for dtype in ("bfloat16", "float32")
        for images, boxes, bins in ((1, 1000, 7), (1, 100, 14), (2, 1024, 7), (2, 256, 14))
    },
    limits={
        "_list_boxes_kernel": {"cuda": Limit(32), "hip": Limit(40)},
        "_roi_align_backward_kernel": {
            "cuda": Limit(232, wide_loads=True, wide_stores=True),
            "hip": Limit(152, wide_loads=True),
        },
        "_roi_align_forward_kernel": {
            "cuda": Limit(168, wide_loads=True, wide_stores=True),
            "hip": Limit(88, wide_loads=True, wide_stores=True),
        },
    },
    check_random=_check_random,
    check_large=partial(check_large_map, fastmask.roi_align),
)
