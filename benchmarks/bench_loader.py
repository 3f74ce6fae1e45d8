"""Reading training data: JPEG files and polygons in COCO's format to resized images and masks, in one process.

The peer is torchvision's data set for detection, `CocoDetection` with `wrap_dataset_for_transforms_v2`, which
rasterises each polygon with pycocotools and resizes the masks with the image. One thread, as in each process of a
`DataLoader`. It is not measured on a GPU, which does none of this.
"""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from benchmarks.reporting.results import FASTMASK
from tests.oracles import coco_photographs

IMAGES, PER_BATCH = 20, 2
SIZE, OBJECTS = (480, 640), 7  # COCO's usual size, and its mean number of objects
MIN_SIZE, MAX_SIZE = 800, 1333  # §3.1

Read = tuple[list[tuple[int, ...]], list[Tensor]]  # (height, width) of each image, and the boxes of each


@pytest.mark.quick
def bench_images_with_masks(comparison, tmp_path):
    if comparison.on_gpu:
        pytest.skip("reads data on the CPU")
    from models.config import DataConfig
    from models.data.coco import CocoDataset
    from models.data.loader import train_loader

    coco_photographs.write(tmp_path, "train", SIZE, images=IMAGES, objects=OBJECTS)
    dataset = CocoDataset(tmp_path, "train", training=True)
    data = DataConfig(train_min_sizes=(MIN_SIZE,), workers=0)
    batches = iter(train_loader(dataset, data, PER_BATCH, max_size=MAX_SIZE, seed=0))
    transforms = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), v2.RandomShortestSize(MIN_SIZE, MAX_SIZE)])
    peer = wrap_dataset_for_transforms_v2(
        CocoDetection(tmp_path / "train", tmp_path / "annotations" / "instances_train.json", transforms=transforms),
        target_keys=["boxes", "labels", "masks"],
    )

    def fastmask_reads() -> Read:
        """An epoch of the endless batches."""
        sizes, boxes = [], []
        for batch in islice(batches, IMAGES // PER_BATCH):
            sizes += [tuple(image.shape[1:]) for image in batch.images]
            boxes += batch.targets.boxes.unbind()
        return sizes, boxes

    def torchvision_reads() -> Read:
        samples = [peer[index] for index in range(IMAGES)]
        return [tuple(image.shape[1:]) for image, _ in samples], [target["boxes"] for _, target in samples]

    def one_thread(read):
        def call() -> Read:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return read()
            finally:
                torch.set_num_threads(threads)

        return call

    comparison.run(
        f"{IMAGES} images of {SIZE[0]} x {SIZE[1]} with {OBJECTS} polygons each",
        {FASTMASK: one_thread(fastmask_reads), "torchvision": one_thread(torchvision_reads)},
        _same,
        events=False,
        images=IMAGES,
        target={"cpu": 3},
    )


def _same(result: Read, expected: Read) -> bool:
    """In another order, flipped or not: the same boxes but for their positions. torchvision rounds sizes down."""

    def sides(read: Read) -> Tensor:
        return torch.cat([boxes[:, 2:] - boxes[:, :2] for boxes in read[1]]).sum(1).sort().values

    sizes, others = (torch.tensor(sorted(read[0])) for read in (result, expected))
    return int((sizes - others).abs().max()) <= 1 and torch.allclose(sides(result), sides(expected), atol=1.0)
