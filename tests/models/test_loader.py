"""Batches and images from worker processes: reproducible, divided among processes, bad images reported."""

import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from models.config import DataConfig
from models.data.coco import CocoDataset
from models.data.loader import BadSample, TrainSampler, eval_loader, train_loader
from models.data.problems import DataError

pytestmark = [
    pytest.mark.reference_only,
    # Python 3.12 warns that threads do not survive a fork; the workers do not need them.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

LANDSCAPE, PORTRAIT = (30, 40), (40, 30)  # height, width
NUM_IMAGES = 10


@pytest.fixture
def root(tmp_path):
    """Images 100..109 of noise, every third one a portrait, each with one box."""
    for folder in ("annotations", "train", "val"):
        (tmp_path / folder).mkdir()
    random = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(NUM_IMAGES):
        height, width = LANDSCAPE if index % 3 else PORTRAIT
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(tmp_path / "train" / f"{index}.png")
        images.append({"id": 100 + index, "file_name": f"{index}.png", "height": height, "width": width})
        box = {"bbox": [5, 6, 10, 12], "segmentation": [[5, 6, 15, 6, 15, 18]], "area": 60, "iscrowd": 0}
        annotations.append({"id": index, "image_id": 100 + index, "category_id": 1} | box)
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(coco))
    return tmp_path


def config(workers=0):
    return DataConfig(train_min_sizes=(16, 20, 24), workers=workers)


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.targets.image_ids == other.targets.image_ids
        for image, other_image in zip(batch.images, other.images, strict=True):
            assert torch.equal(image, other_image)
        for tensor, other_tensor in zip(batch.targets.tensors(), other.targets.tensors(), strict=True):
            assert torch.equal(tensor, other_tensor)


def test_any_number_of_workers_gives_the_same(root):
    dataset = CocoDataset(root, "train", training=True)
    torch.manual_seed(1)
    alone = take(train_loader(dataset, config(), 2, max_size=100, seed=3), 9)
    torch.manual_seed(2)
    shared = take(train_loader(dataset, config(workers=2), 2, max_size=100, seed=3), 9)
    assert_same(alone, shared)
    assert len({image.shape for batch in alone for image in batch.images}) > 2
    other_seed = take(train_loader(dataset, config(), 2, max_size=100, seed=4), 9)
    assert [b.targets.image_ids for b in alone] != [b.targets.image_ids for b in other_seed]


def test_loading_does_not_draw_from_the_global_generator(root):
    dataset = CocoDataset(root, "train", training=True)
    state = torch.get_rng_state()
    take(train_loader(dataset, config(), 2, max_size=100, seed=3), 3)
    list(eval_loader(dataset, config()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", [1, 4, 23])
def test_a_start_continues_an_uninterrupted_run(root, start):
    dataset = CocoDataset(root, "train", training=True)
    whole = take(train_loader(dataset, config(), 2, max_size=100, seed=3), start + 3)
    resumed = take(train_loader(dataset, config(), 2, max_size=100, seed=3, start=start), 3)
    assert_same(whole[start:], resumed)


def sizes(landscape, portrait):
    return torch.tensor([LANDSCAPE] * landscape + [PORTRAIT] * portrait)


def test_batches_are_of_one_orientation_and_epochs_complete():
    sampler = TrainSampler(sizes(13, 6), 4, seed=0)
    batches = take(sampler, 19 * 3)  # 12 epochs
    for batch in batches:
        assert len(batch) == 4
        assert len({index < 13 for index, _ in batch}) == 1
    counts = Counter(index for batch in batches for index, _ in batch)
    # Up to 3 images of each orientation are left over from an epoch, so a count may be one too low or too high
    assert set(counts) == set(range(19))
    assert all(11 <= count <= 13 for count in counts.values())
    draws = [draw for batch in batches for draw in batch]
    assert len({seed for _, seed in draws}) == len(draws)  # no two augmentations are the same
    first, second = ([index for index, _ in draws[start : start + 19]] for start in (0, 19))
    assert first != second


def test_processes_share_each_batch():
    whole = take(TrainSampler(sizes(13, 6), 6, seed=5), 20)
    shares = [take(TrainSampler(sizes(13, 6), 2, seed=5, rank=rank, world=3), 20) for rank in range(3)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == whole


def test_fewer_images_than_a_batch():
    batches = take(TrainSampler(sizes(2, 0), 5, seed=0), 4)
    assert Counter(index for batch in batches for index, _ in batch) == {0: 10, 1: 10}


def test_no_images():
    with pytest.raises(ValueError, match="sizes: expected at least one image, got none"):
        TrainSampler(torch.zeros(0, 2), 1, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_each_image_once(root, workers):
    dataset = CocoDataset(root, "train")
    loaders = [eval_loader(dataset, config(workers), rank=rank, world=3) for rank in range(3)]
    assert [len(loader) for loader in loaders] == [4, 3, 3]
    shares = [list(loader) for loader in loaders]
    assert [len(share) for share in shares] == [4, 3, 3]
    seen = {id: image for share in shares for image, id in share}
    assert sorted(seen) == dataset.image_ids
    for index, id in enumerate(dataset.image_ids):
        assert torch.equal(seen[id], dataset[index][0])


def spoil(root, *indices):
    for index in indices:
        path = root / "train" / f"{index}.png"
        path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_stop(root, workers):
    spoil(root, 4)
    dataset = CocoDataset(root, "train", training=True)
    message = r"^image 104: .*4\.png: expected a whole image.*on_error=skip"
    with pytest.raises(DataError, match=message):
        take(train_loader(dataset, config(workers), 2, max_size=100, seed=0), 10)
    with pytest.raises(DataError, match=message):
        list(eval_loader(dataset, config(workers)))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_and_replaced(root, workers):
    spoil(root, 4, 5)
    dataset = CocoDataset(root, "train", training=True, on_error="skip")
    batches = take(train_loader(dataset, config(workers), 2, max_size=100, seed=0), 15)
    assert all(len(batch.images) == len(batch.targets.image_ids) == 2 for batch in batches)
    assert not {104, 105} & {image_id for batch in batches for image_id in batch.targets.image_ids}
    assert {bad.image_id for batch in batches for bad in batch.bad} == {104, 105}
    assert dataset.problems.counts == {"unreadable image": 2}  # in three epochs
    assert "4.png" in dataset.summary()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_and_left_out(root, workers):
    spoil(root, 4, 5)
    dataset = CocoDataset(root, "train", on_error="skip")
    samples = list(eval_loader(dataset, config(workers)))
    assert [sample.image_id for sample in samples if isinstance(sample, BadSample)] == [104, 105]
    assert len(samples) == NUM_IMAGES
    assert dataset.problems.counts == {"unreadable image": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_no_image_that_can_be_read(root, workers):
    """The search for a replacement ends."""
    spoil(root, *range(NUM_IMAGES))
    dataset = CocoDataset(root, "train", training=True, on_error="skip")
    with pytest.raises(DataError, match="train: expected an image that can be read, got none"):
        take(train_loader(dataset, config(workers), 2, max_size=100, seed=0), 1)
    assert len(dataset.problems) == NUM_IMAGES


def test_the_data_set_can_be_pickled_for_spawned_workers(root):
    dataset = CocoDataset(root, "train", training=True)
    copy = pickle.loads(pickle.dumps(train_loader(dataset, config(), 2, max_size=100, seed=3).loader.dataset))
    image, target = copy[3, 17].sample
    assert image.shape[0] == 3
    assert target.image_id == 103
