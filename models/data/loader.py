"""Batches for training and pictures for evaluation, read by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from models.config import DataConfig
from models.data.coco import CocoDataset
from models.data.problems import DataError
from models.data.transforms import Augmentation, mirrored_keypoints
from models.structures import Target

Draw = tuple[int, int]  # an image's index, and the seed of its augmentation


@dataclass(frozen=True)
class BadSample:
    """A picture that could not be used, and why."""

    image_id: int
    error: DataError


class Batch(NamedTuple):
    """What training gets. In place of each bad image stands another, so that all batches have the same size."""

    images: list[Tensor]  # uint8 RGB [3, H, W]
    targets: list[Target]
    bad: list[BadSample]


class TrainSampler(Sampler[list[Draw]]):
    """Endless batches of images that are all landscape or all portrait: less padding.

    Each epoch is a new permutation; images that do not fill a batch of their kind wait for the next epoch's. Seeds of
    augmentations are drawn here: an item is the same in whichever process it is read.
    """

    def __init__(
        self, sizes: Tensor, images_per_batch: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        """Share each batch of `images_per_batch * world` images between processes.

        Args:
            sizes: `[N, 2]`, (height, width) of each image.
            images_per_batch: of one process.
            seed: the same in all processes.
            start: how many batches to leave out: those that a run had before it was stopped.
            rank: of this process.
            world: number of processes.
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
        number, first = len(self.landscape), self.rank * self.images_per_batch
        while True:
            seeds = torch.randint(2**32, (number,), generator=generator).tolist()
            for index in torch.randperm(number, generator=generator).tolist():
                group = waiting[self.landscape[index]]
                group.append((index, seeds[index]))
                if len(group) == self.images_per_batch * self.world:
                    yield group[first : first + self.images_per_batch]
                    group.clear()


Item = TypeVar("Item")


class Loader(Generic[Item]):
    """Iterates over what workers read, each item checked in this process, the one that the user sees."""

    def __init__(self, loader: DataLoader, check: Callable[[Item], None]) -> None:
        self.loader = loader
        self.check = check

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Item]:
        """Each item.

        Raises:
            DataError: an item is bad, and the data set is not to skip it.
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
    """Endless augmented batches, the same for any number of workers.

    Args:
        dataset: opened for training.
        data: sizes, flips, workers.
        images_per_batch: of this process.
        max_size: the longer edge at most, as `InputConfig` has it.
        seed: of the order and of all augmentation; the same in all processes.
        start: how many batches to leave out: those that a run had before it was stopped.
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
    """Each picture once, uint8 RGB `[3, H, W]` as it was read, with its image's id, or what is bad about it.

    Args:
        dataset: the pictures.
        data: workers.
        rank: of this process, which gets every `world`-th picture.
        world: number of processes.
    """
    loader = DataLoader(
        _EvalItems(dataset), sampler=range(rank, len(dataset), world), batch_size=None, **_process_options(data)
    )
    return Loader(loader, partial(_check_picture, dataset))


class _TrainItem(NamedTuple):
    sample: tuple[Tensor, Target] | None
    bad: list[BadSample]


class _TrainItems(Dataset[_TrainItem]):
    def __init__(self, dataset: CocoDataset, augmentation: Augmentation) -> None:
        self.dataset = dataset
        self.augmentation = augmentation

    def __getitem__(self, draw: Draw) -> _TrainItem:
        index, seed = draw
        bad: list[BadSample] = []
        for step in range(len(self.dataset)):
            place = (index + step) % len(self.dataset)
            try:
                return _TrainItem(self.augmentation(*self.dataset[place], seed), bad)
            except DataError as error:
                bad.append(BadSample(self.dataset.image_ids[place], error))
                if self.dataset.problems.on_error != "skip":
                    break
        return _TrainItem(None, bad)


class _EvalItems(Dataset[tuple[Tensor, int] | BadSample]):
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
    return Batch([image for image, _ in samples], [target for _, target in samples], bad)


def _check_batch(dataset: CocoDataset, batch: Batch) -> None:
    for bad in batch.bad:
        dataset.problems.add(bad.error)
    if not batch.images:
        raise DataError("no images", f"{dataset.folder}: expected an image that can be read, got none")


def _check_picture(dataset: CocoDataset, item: tuple[Tensor, int] | BadSample) -> None:
    if isinstance(item, BadSample):
        dataset.problems.add(item.error)


def _process_options(data: DataConfig) -> dict:
    # A generator of its own: a loader would otherwise take a number from the one that training resumes with.
    return {
        "num_workers": data.workers,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),
    }
