"""RoIAlign over P2 to P5, for boxes and for masks (He et al. 2017, §3), and over the one map of a C4.

K RoIs, C channels, P bins along an axis, S samples along an axis of a bin. Bytes: the pixels of the maps that some RoI
covers, read (forward), or the gradients of the maps, written whole (backward); the boxes; K * C * P^2 outputs. FLOPs: a
multiply-add for each of the four neighbours of K * C * (P * S)^2 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor

import fastmask
from benchmarks.harness.comparison import Race, parameters
from benchmarks.harness.machine import PEERS, peer
from benchmarks.harness.pooling import DIRECTIONS, DTYPES, LAYOUTS, Pool, race_passes, torchvision_in
from benchmarks.harness.workloads import ADVERSARIAL, C4, IMAGE, STRIDES, c4_map, covered, objects, pyramid
from benchmarks.reporting.results import OURS
from fastmask.kernels.roi_align.reference import roi_align_reference

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
        settings = (bins, bins, False, SCALES, SAMPLES, False, 224.0, 4, "torchvision")
        pools["torch.compile"] = lambda: reference(maps, rows, *settings)[0]
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
