"""The static model of RoIAlign: what its kernels do with the boxes of `harness/workloads.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.harness.operators import Launch, Target, Trips, Work
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


def _spec(launch: Launch) -> RoIAlignSpec:
    a = launch.arguments
    return RoIAlignSpec(a["PH"], a["PW"], SCALES, a["RATIO"], a["ALIGNED"], a["REDUCTION"])


def _forward(launch: Launch) -> Work:
    a, spec = launch.arguments, _spec(launch)
    features = a["features"]
    boxes = boxes_of(a["num_images"], len(a["boxes"]))
    rois = to_rois(boxes)
    row_bytes = a["C"] * features[0].itemsize
    outputs = len(rois) * spec.pooled_height * spec.pooled_width * row_bytes
    pixels, grids = 0, []
    for rows, feature, scale in zip(select_boxes(rois, a["num_images"], spec), features, SCALES, strict=True):
        pixels += _pixels_of_programs(rois[rows], feature, scale, spec, a["BINS"])
        grids.append(_grid(rois[rows], scale, spec))
    height, width = torch.cat(grids).unbind(1)
    trips: Trips = {}
    longest: Trips = {}
    if spec.sampling_ratio == 0:
        trips = {"i": float(height.mean()), "j": float((height * width).mean() / height.mean())}
        most = int((height * width).argmax())
        longest = {"i": float(height[most]), "j": float(width[most])}
    return Work(
        hbm_bytes=Inputs(features, boxes, STRIDES).bytes("forward", outputs),
        l2_bytes=pixels * row_bytes + outputs + launch.programs * BOX_BYTES,
        trips=trips,
        longest=longest,
    )


def _pixels_of_programs(rois: Tensor, feature: Tensor, scale: float, spec: RoIAlignSpec, bins: int) -> int:
    """Pixels of a level that programs of `bins` bins of a box read, those of each program counted once."""
    images, _, height, width = feature.shape
    samples = sample_boxes(rois, Level(images, height, width, scale, spec))
    per_box = spec.pooled_height * spec.pooled_width
    box, bin = samples.bin // per_box, samples.bin % per_box
    program = box * -(-per_box // bins) + bin // bins
    return len((program[:, None] * (images * height * width) + samples.pixel).unique())


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


def _tiles(launch: Launch, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor, _Reached, _Reached]]:
    """RoIs `[K, 5]`, the sizes of their grids, and the tiles that they reach along y and x, of each level and image."""
    a = launch.arguments
    rois = to_rois(boxes_of(a["num_images"], a["num_boxes"]))
    spec = RoIAlignSpec(a.get("PH", 7), a.get("PW", 7), SCALES, 2, a["ALIGNED"], "mean")
    shift = 0.5 if a["ALIGNED"] else 0.0
    for rows, (height, width), scale in zip(select_boxes(rois, a["num_images"], spec), sizes, SCALES, strict=True):
        for image in range(a["num_images"]):
            of_image = rois[rows][rois[rows, 0] == image]
            x1, y1, x2, y2 = (of_image[:, 1:] * scale - shift).unbind(1)
            along_y = _Reached(y1, y2, height, a["TILE"], a["ALIGNED"])
            along_x = _Reached(x1, x2, width, a["TILE"], a["ALIGNED"])
            yield of_image, _grid(of_image, scale, spec), along_y, along_x


def _list(launch: Launch) -> Work:
    a = launch.arguments
    boxes = a["num_boxes"] * BOX_BYTES
    return Work(
        hbm_bytes=boxes + 4 * launch.programs,
        l2_bytes=boxes * CACHES + 4 * launch.programs,  # all programs of a multiprocessor read the same boxes
        trips={"start": float(-(-a["num_boxes"] // a["STEP"]))},
    )


def _backward(launch: Launch) -> Work:
    a, spec = launch.arguments, _spec(launch)
    outputs = a["outputs"]
    boxes = boxes_of(a["num_images"], a["num_boxes"])
    entries, most, products, rows, columns = 0.0, 0.0, 0.0, 0.0, 0.0
    tiles = 0
    for of_image, grid, along_y, along_x in _tiles(launch, [output.shape[2:] for output in outputs]):
        del of_image
        reached_y, reached_x = along_y.hit.float(), along_x.hit.float()
        counts = reached_y @ reached_x.T
        tiles += counts.numel()
        entries += float(counts.sum())
        most = max(most, float(counts.max()))
        across = reached_x.sum(0)
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
TARGETS: Sequence[Target] = ()
