"""The static model of RoIAlign: what its kernels do with the boxes of `harness/workloads.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.harness.operators import Launch, ModelTarget, Trips, Work
from benchmarks.harness.pooling import Inputs
from benchmarks.harness.workloads import STRIDES, objects
from fastmask.kernels.roi_align.geometry import Level, sample_boxes, select_boxes
from fastmask.kernels.roi_align.op import RoIAlignSpec

SCALES = [1 / stride for stride in STRIDES]
BOX_BYTES = 20
CACHES = 132  # L1 caches, one of each multiprocessor


def boxes_of(images: int, count: int) -> list[Tensor]:
    """`[K, 4]` boxes of each image."""
    return [objects(count // images, seed=image) for image in range(images)]


def to_rois(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes `[K, 5]`."""
    return torch.cat([torch.nn.functional.pad(box, (1, 0), value=image) for image, box in enumerate(boxes)])


def _sizes(features: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Height and width of each level."""
    return tuple((feature.shape[2], feature.shape[3]) for feature in features)


def _forward(launch: Launch) -> Work:
    a = launch.arguments
    features = a["features"]
    boxes = boxes_of(a["num_images"], len(a["boxes"]))
    row_bytes = a["C"] * features[0].itemsize
    outputs = len(a["boxes"]) * a["PH"] * a["PW"] * row_bytes
    moved = Inputs(features, boxes, STRIDES).bytes("forward", outputs)
    covered = moved - outputs - sum(box.nbytes for box in boxes)
    settings = (a["PH"], a["PW"], a["RATIO"], a["ALIGNED"])
    bins = a["BINS"] * a["tiles_per_program"]
    pixels, grid = _sampled(a["num_images"], len(a["boxes"]), _sizes(features), settings, bins)
    height, width = grid.unbind(1)
    channel_blocks = -(-a["C"] // (a["LINES"] * a["CHANNELS"]))
    tiles = -(-a["PH"] * a["PW"] // a["BINS"])
    trips: dict[str, float | tuple[float, ...]] = {"tile": len(a["boxes"]) * channel_blocks * tiles / launch.programs}
    longest: Trips = {}
    if a["RATIO"] == 0:
        trips |= {"i": float(height.mean()), "j": float((height * width).mean() / height.mean())}
        most = int((height * width).argmax())
        longest = {"i": float(height[most]), "j": float(width[most])}
    return Work(
        hbm_bytes=moved,
        l2_bytes=pixels * row_bytes + outputs + launch.programs * BOX_BYTES,
        trips=trips,
        longest=longest,
        shared_bytes=covered,
        reread_bytes=pixels * row_bytes - covered,
    )


@lru_cache
def _sampled(
    images: int, count: int, sizes: tuple[tuple[int, int], ...], settings: tuple[int, int, int, bool], bins: int
) -> tuple[int, Tensor]:
    """Pixels that programs of `bins` bins of a box read, and the sizes of the boxes' grids, `[K, 2]`.

    The pixels of a program are counted once: several bins share them.
    """
    pooled_height, pooled_width, ratio, aligned = settings
    spec = RoIAlignSpec(pooled_height, pooled_width, SCALES, ratio, aligned, "mean")
    rois = to_rois(boxes_of(images, count))
    pixels, grids = 0, []
    for rows, (height, width), scale in zip(select_boxes(rois, images, spec), sizes, SCALES, strict=True):
        samples = sample_boxes(rois[rows], Level(images, height, width, scale, spec))
        per_box = pooled_height * pooled_width
        box, bin = samples.bin // per_box, samples.bin % per_box
        program = box * -(-per_box // bins) + bin // bins
        pixels += len((program[:, None] * (images * height * width) + samples.pixel).unique())
        grids.append(_grid(rois[rows], scale, spec))
    return pixels, torch.cat(grids)


def _grid(rois: Tensor, scale: float, spec: RoIAlignSpec) -> Tensor:
    """Rows and columns of samples of a bin, `[K, 2]`, of an adaptive grid."""
    side = (rois[:, 3:] - rois[:, 1:3]).flip(1) * scale
    return (side / side.new_tensor([spec.pooled_height, spec.pooled_width])).ceil()


class _Reached:
    """Which tiles of a level the boxes of an image reach, along one axis."""

    def __init__(self, start: Tensor, end: Tensor, extent: int, tile: int, aligned: bool) -> None:
        end = end if aligned else end.maximum(start + 1)
        self.first = torch.arange(0, extent, tile)[:, None]
        self.hit = (end + 1 >= self.first) & (start <= self.first + tile)
        self.start, self.end, self.tile = start, end, tile

    def bins(self, count: int) -> Tensor:
        """How many of a box's bins the backward visits in a tile, `[tiles, K]`."""
        bin = (self.end - self.start) / count
        low = (((self.first - 1 - self.start) / bin).floor() - 1).clamp(0, count)
        high = (((self.first + self.tile - self.start) / bin).ceil() + 1).clamp(0, count)
        return high - low


def _tiles(launch: Launch, spec: RoIAlignSpec) -> Iterator[tuple[Tensor, _Reached, _Reached]]:
    """Of each level and image: the sizes of the boxes' grids, and the tiles that the boxes reach along y and x."""
    a = launch.arguments
    rois = to_rois(boxes_of(a["num_images"], a["num_boxes"]))
    shift = 0.5 if spec.aligned else 0.0
    sizes = _sizes(a["outputs"])
    for rows, (height, width), scale in zip(select_boxes(rois, a["num_images"], spec), sizes, SCALES, strict=True):
        for image in range(a["num_images"]):
            of_image = rois[rows][rois[rows, 0] == image]
            x1, y1, x2, y2 = (of_image[:, 1:] * scale - shift).unbind(1)
            along_y = _Reached(y1, y2, height, a["TILE"], spec.aligned)
            along_x = _Reached(x1, x2, width, a["TILE"], spec.aligned)
            yield _grid(of_image, scale, spec), along_y, along_x


def _list(launch: Launch) -> Work:
    a = launch.arguments
    boxes = a["num_boxes"] * BOX_BYTES
    return Work(
        hbm_bytes=boxes + 4 * launch.programs,
        l2_bytes=boxes * CACHES + 4 * launch.programs,  # all programs of a multiprocessor read the same boxes
        trips={"start": float(-(-a["num_boxes"] // a["STEP"]))},
    )


def _backward(launch: Launch) -> Work:
    a = launch.arguments
    spec = RoIAlignSpec(a["PH"], a["PW"], SCALES, a["RATIO"], a["ALIGNED"], "mean")
    outputs = a["outputs"]
    boxes = boxes_of(a["num_images"], a["num_boxes"])
    tiles, entries, most, products, rows, columns = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for grid, along_y, along_x in _tiles(launch, spec):
        reached_y, across = along_y.hit.float(), along_x.hit.sum(0)  # of each box: tiles of a row that it reaches
        counts = reached_y @ along_x.hit.float().T
        tiles += counts.numel()
        entries += float(counts.sum())
        most = max(most, float(counts.max()))
        products += float((reached_y * (along_y.bins(spec.pooled_height) / a["ROWS"]).ceil() * across).sum())
        rows += float((reached_y.sum(0) * across * grid[:, 0]).sum())
        columns += float((reached_y.sum(0) * across * grid[:, 1]).sum())
    one_product = spec.pooled_height <= a["ROWS"]
    trips: dict[str, float | tuple[float, ...]] = {"entry": entries / tiles}
    if not one_product:
        trips["first_p"] = products / entries
    if spec.sampling_ratio == 0:
        trips["_axis_weights.i"] = (columns / entries, rows / entries)
    bins = spec.pooled_height * spec.pooled_width
    row_bytes = a["C"] * outputs[0].itemsize
    loaded = entries * bins if one_product else products * a["ROWS"] * spec.pooled_width
    channel_blocks = launch.programs // tiles
    return Work(
        hbm_bytes=Inputs(outputs, boxes, STRIDES).bytes("backward", len(torch.cat(boxes)) * bins * row_bytes),
        l2_bytes=loaded * row_bytes
        + entries * channel_blocks * (BOX_BYTES + 4)
        + sum(output.nbytes for output in outputs),
        trips=trips,
        longest={"entry": most},
    )


MODELS = {
    "_list_boxes_kernel": _list,
    "_roi_align_backward_kernel": _backward,
    "_roi_align_forward_kernel": _forward,
}
BACKWARD = ("_list_boxes_kernel", "_roi_align_backward_kernel")
FORWARD = ("_roi_align_forward_kernel",)
TARGETS = (
    ModelTarget("1000 RoIs 7x7, torchvision, bfloat16", FORWARD, 50),
    ModelTarget("1000 RoIs 7x7, detectron2, bfloat16", FORWARD, 105),
    ModelTarget("100 RoIs 14x14, torchvision, bfloat16", FORWARD, 20),
    ModelTarget("1024 RoIs 7x7, torchvision, bfloat16", BACKWARD, 150),
)
