"""The static model of matching: what its kernels do with the anchors of an image and objects of COCO's sizes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.harness.operators import Launch, ModelTarget, Work
from benchmarks.harness.workloads import IMAGE, STRIDES, candidates, objects

SECTOR = 32


def anchors() -> Tensor:
    """`[268569, 4]`: three aspect ratios at each position of P2 to P6, of 32^2 to 512^2 pixels (Lin et al. 2017)."""
    levels = []
    for stride in (*STRIDES, 2 * STRIDES[-1]):
        y, x = (torch.arange(-(-side // stride)) * stride for side in IMAGE)
        y, x = torch.meshgrid(y, x, indexing="ij")
        ratio = torch.tensor([0.5, 1.0, 2.0]).sqrt()
        half = torch.stack([1 / ratio, ratio, -1 / ratio, -ratio], 1) * -4 * stride
        levels.append((torch.stack([x, y, x, y], -1)[:, :, None] + half).flatten(0, 2))
    return torch.cat(levels)


ANCHORS = len(anchors())


def _touched(launch: Launch) -> Tensor:
    """How many objects touch each tile of one image, `[tiles]`."""
    a = launch.arguments
    boxes = anchors() if a["SHARED"] else candidates(a["num_boxes"])[0]
    gt = objects(a["num_gt"])
    size = a["BLOCK"]
    tiles = torch.nn.functional.pad(boxes, (0, 0, 0, -len(boxes) % size)).view(-1, size, 4)
    low, high = tiles[..., :2].amin(1)[:, None], tiles[..., 2:].amax(1)[:, None]
    return ((gt[:, :2] < high) & (gt[:, 2:] > low)).all(2).sum(1)


def _match(launch: Launch) -> Work:
    a = launch.arguments
    touched = _touched(launch)
    groups = -(-a["num_gt"] // a["GROUP"])
    images = launch.programs // a["tiles"]
    outputs = images * a["num_boxes"] * 9
    highest = 0 if a["highest"] is None else a["highest"].numel()
    return Work(
        hbm_bytes=a["boxes"].nbytes + a["gt_boxes"].nbytes + outputs,
        l2_bytes=images * a["num_boxes"] * 4 * a["boxes"].itemsize
        + launch.programs * 4 * a["num_gt"] * a["boxes"].itemsize
        + outputs
        + highest * SECTOR,
        trips={"first": (float(groups), 0.0), "current": (float(touched.float().mean()) / groups, 0.0)},
        longest={"first": (float(groups), 0.0), "current": (float(touched.max()) / groups, 0.0)},
        branches={"if num_regions > 0": 0.0},
    )


@lru_cache
def _reaching(num_gt: int, size: int) -> Tensor:
    """How many tiles reach the highest IoU of each object, `[G]`."""
    tiles = anchors().split(size)
    highest = torch.stack([box_iou(objects(num_gt), tile).amax(1) for tile in tiles])
    return (highest == highest.amax(0)).sum(0).float()


def _label_best(launch: Launch) -> Work:
    a = launch.arguments
    reaching = _reaching(a["num_gt"], a["BLOCK"])
    sweeps = -(-a["tiles"] // a["TILES"])
    tile = a["BLOCK"] * (4 * a["boxes"].itemsize + 1)
    return Work(
        hbm_bytes=a["highest"].nbytes,
        l2_bytes=2 * a["highest"].nbytes + launch.programs * (float(reaching.mean()) * tile + SECTOR),
        trips={"first": (float(sweeps), float(sweeps)), "reached": float(reaching.mean()) / sweeps},
        longest={"first": (float(sweeps), float(sweeps)), "reached": float(reaching.max()) / sweeps},
    )


MODELS = {"match_boxes_kernel": _match, "label_best_kernel": _label_best}
KERNELS = tuple(MODELS)
TARGETS = (
    ModelTarget("2 x 268,569 anchors, 100 objects", KERNELS, 30),
    ModelTarget("2 x 2,100 proposals, 100 objects", KERNELS[:1], 16),
)
