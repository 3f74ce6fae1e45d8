"""Batches for training and images for evaluation, read by worker processes.

The path of a training image: in a worker process, `CocoDataset` reads the image and its target, `Augmentation` flips
and resizes both, and `_collate` puts them into a `Batch`; in the main process, `_check_batch` reports bad images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from models.config import DataConfig
from models.data.coco import CocoDataset
from models.data.problems import DataError
from models.data.transforms import Augmentation, mirrored_keypoints
from models.structures import PaddedTargets, Target, pad_targets

Draw = tuple[int, int]  # the index of an image, and the seed of its augmentation
Sample = tuple[Tensor, Target]  # uint8 RGB [3, H, W], and the ground truth in its pixels


@dataclass(frozen=True)
class BadSample:
    """An image that cannot be used, and why."""

    image_id: int
    error: DataError


class Batch(NamedTuple):
    """A mini-batch for training. Each bad image is replaced by another one, so all batches have the same size."""

    images: list[Tensor]  # uint8 RGB [3, H, W]
    targets: PaddedTargets
    bad: list[BadSample]


class TrainSampler(Sampler[list[Draw]]):
    """Endless batches. The images of a batch are all landscape or all portrait, so that they need less padding.

    Each epoch is a new permutation. Images that do not fill a batch of their orientation are carried over to the next
    epoch. The seeds of augmentations are drawn here, so a sample does not depend on the worker process that reads it.
    """

    def __init__(
        self, sizes: Tensor, images_per_batch: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        """Divide each batch of `images_per_batch * world` images among the processes.

        Args:
            sizes: `[N, 2]`, (height, width) of each image.
            images_per_batch: in each process.
            seed: the same in all processes.
            start: number of batches to skip; a resumed run has already seen them.
            rank: of this process.
            world: number of processes.

        Raises:
            ValueError: there are no images.
        """
        if not len(sizes):
            raise ValueError("sizes: expected at least one image, got none")
        self.landscape = (sizes[:, 1] >= sizes[:, 0]).tolist()
        self.images_per_batch = images_per_batch
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[list[Draw]]:
        return islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(self.seed)
        waiting: dict[bool, list[Draw]] = {True: [], False: []}
        num_images, first = len(self.landscape), self.rank * self.images_per_batch
        while True:
            seeds = torch.randint(2**32, (num_images,), generator=generator).tolist()
            for index in torch.randperm(num_images, generator=generator).tolist():
                group = waiting[self.landscape[index]]
                group.append((index, seeds[index]))
                if len(group) == self.images_per_batch * self.world:
                    yield group[first : first + self.images_per_batch]
                    group.clear()


Item = TypeVar("Item")


class Loader(Generic[Item]):
    """A `DataLoader` whose items are checked in the main process, which counts bad ones or raises their error."""

    def __init__(self, loader: DataLoader[Any], check: Callable[[Item], None]) -> None:
        """Wrap a loader.

        Args:
            loader: yields the items.
            check: called with each item; raises if the item is bad and bad data is not skipped.
        """
        self.loader = loader
        self.check = check

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Item]:
        """Iterate over the items.

        Raises:
            DataError: an item is bad and the data set does not skip bad data.
        """
        for item in self.loader:
            self.check(item)
            yield item


def train_loader(
    dataset: CocoDataset,
    data: DataConfig,
    images_per_batch: int,
    *,
    max_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Loader[Batch]:
    """Endless augmented batches, which do not depend on the number of worker processes.

    Args:
        dataset: opened for training.
        data: sizes, flips, number of workers.
        images_per_batch: in this process.
        max_size: largest length of the longer side in pixels, as in `InputConfig`.
        seed: of the order and of all augmentations; the same in all processes.
        start: number of batches to skip; a resumed run has already seen them.
        rank: of this process.
        world: number of processes.
    """
    mirrored = mirrored_keypoints(dataset.keypoint_names)
    augmentation = Augmentation(data.train_min_sizes, max_size, data.flip, mirrored)
    sampler = TrainSampler(dataset.sizes, images_per_batch, seed=seed, start=start, rank=rank, world=world)
    loader = DataLoader(
        _TrainItems(dataset, augmentation), batch_sampler=sampler, collate_fn=_collate, **_process_options(data)
    )
    return Loader(loader, partial(_check_batch, dataset))


def eval_loader(
    dataset: CocoDataset, data: DataConfig, *, rank: int = 0, world: int = 1
) -> Loader[tuple[Tensor, int] | BadSample]:
    """Each image once, uint8 RGB `[3, H, W]` in its original size, with its id; for a bad image, a `BadSample`.

    Args:
        dataset: the images.
        data: number of workers.
        rank: of this process, which gets every `world`-th image.
        world: number of processes.
    """
    loader = DataLoader(
        _EvalItems(dataset), sampler=range(rank, len(dataset), world), batch_size=None, **_process_options(data)
    )
    return Loader(loader, partial(_check_image, dataset))


class _TrainItem(NamedTuple):
    sample: Sample | None  # None if no image could be read
    bad: list[BadSample]  # images that were tried before


class _TrainItems(Dataset[_TrainItem]):
    """Augmented samples, in which a bad image is replaced by the next good one."""

    def __init__(self, dataset: CocoDataset, augmentation: Augmentation) -> None:
        self.dataset = dataset
        self.augmentation = augmentation

    def __getitem__(self, draw: Draw) -> _TrainItem:
        first, seed = draw
        bad: list[BadSample] = []
        for step in range(len(self.dataset)):
            index = (first + step) % len(self.dataset)
            try:
                return _TrainItem(self.augmentation(*self.dataset[index], seed), bad)
            except DataError as error:
                bad.append(BadSample(self.dataset.image_ids[index], error))
                if self.dataset.problems.on_error != "skip":
                    break
        return _TrainItem(None, bad)


class _EvalItems(Dataset[tuple[Tensor, int] | BadSample]):
    """Images with their ids, without targets."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int] | BadSample:
        image_id = self.dataset.image_ids[index]
        try:
            return self.dataset.image(index), image_id
        except DataError as error:
            return BadSample(image_id, error)


def _collate(items: list[_TrainItem]) -> Batch:
    samples = [item.sample for item in items if item.sample is not None]
    bad = [bad for item in items for bad in item.bad]
    return Batch([image for image, _ in samples], pad_targets([target for _, target in samples]), bad)


def _check_batch(dataset: CocoDataset, batch: Batch) -> None:
    for bad in batch.bad:
        dataset.problems.add(bad.error)
    if not batch.images:
        raise DataError("no images", f"{dataset.folder}: expected an image that can be read, got none")


def _check_image(dataset: CocoDataset, item: tuple[Tensor, int] | BadSample) -> None:
    if isinstance(item, BadSample):
        dataset.problems.add(item.error)


def _process_options(data: DataConfig) -> dict[str, Any]:
    # Without this generator, a loader would draw from the global one, whose state a resumed run must reproduce
    return {
        "num_workers": data.workers,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),
    }
