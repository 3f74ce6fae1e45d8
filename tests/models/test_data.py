"""Data sets in COCO's format: images and their targets."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from models.data.coco import CocoDataset
from models.structures import Category
from tests.oracles.coco_files import HEIGHT, WIDTH, content, open_changed, person, rle, write
from tests.oracles.mask_targets import bitmaps

pytestmark = pytest.mark.reference_only


@pytest.fixture
def root(tmp_path):
    write(tmp_path, content())
    return tmp_path


def test_items(root):
    dataset = CocoDataset(root, "val", keypoints=True)
    skeleton = ((0, 1), (0, 2))
    assert dataset.categories == (
        Category(4, "person", ("nose", "left_hand", "right_hand"), skeleton),
        Category(90, "dog"),
    )
    assert dataset.image_ids == [10, 7, 12]
    assert dataset.sizes.tolist() == [[HEIGHT, WIDTH]] * 3
    image, target = dataset[0]
    assert (image.dtype, image.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert target.image_id == 10
    assert target.labels.tolist() == [1, 2]
    assert target.boxes.tolist() == [[4, 4, 12, 14], [15, 3.25, 30, 20]]
    assert target.crowds.tolist() == [[3, 5, 30, 20]]
    assert len(target.masks) == 2
    # COCO's pixel indices become pixel centres; unlabelled keypoints stay zero.
    assert target.keypoints.tolist() == [[[6.5, 5.5, 2], [10.5, 7.5, 1], [0, 0, 0]], [[0, 0, 0]] * 3]
    assert dataset[1][0].unique().tolist() == [1]
    assert torch.equal(dataset.image(1), dataset[1][0])


def test_masks_are_those_of_pycocotools(root, capsys):
    dataset = CocoDataset(root, "val")
    assert capsys.readouterr().out == ""
    coco = COCO(root / "annotations" / "instances_val.json")
    masks = torch.cat([bitmaps(dataset[0][1].masks), bitmaps(dataset[1][1].masks)]).numpy()
    for mask, id in zip(masks, (1, 2, 4), strict=True):
        assert np.array_equal(mask, coco.annToMask(coco.anns[id])), id
    assert masks[2].sum() == 48 + 24


def test_polygons_and_both_kinds_of_rle_of_one_region(tmp_path):
    coco = content()
    polygon = [[4, 4, 12, 4, 12, 14, 4, 14], [20, 2, 25, 2, 25, 9, 20, 9]]
    compressed = coco_mask.merge(coco_mask.frPyObjects(polygon, HEIGHT, WIDTH))
    flat = coco_mask.decode(compressed).flatten(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    runs = np.diff([0, *edges, flat.size]).tolist()
    compressed["counts"] = compressed["counts"].decode()
    segmentations = [polygon, compressed, {"size": [HEIGHT, WIDTH], "counts": runs}]
    coco["annotations"] = [person(id=id, segmentation=value) for id, value in enumerate(segmentations)]
    write(tmp_path, coco)
    masks = bitmaps(CocoDataset(tmp_path, "val")[0][1].masks)
    assert 0 < masks[0].sum() < HEIGHT * WIDTH
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (1500, 2000)])  # runs encoded in one to five characters
def test_every_rle_of_pycocotools_is_well_formed(tmp_path, shape):
    random = np.random.default_rng(0)
    coco = content()
    coco["images"][0] |= {"height": shape[0], "width": shape[1]}
    coco["annotations"] = []
    for id, density in enumerate([0, 0.001, 0.1, 0.5, 0.9, 1]):
        region = np.asfortranarray(random.random(shape) < density, dtype=np.uint8)
        region[shape[0] // 3 :] = id % 2
        coco["annotations"].append(person(id=id, segmentation=rle(region), area=int(region.sum())))
    write(tmp_path, coco)
    assert len(CocoDataset(tmp_path, "val").ground_truth().anns) == 6


def test_masks_and_keypoints_are_optional(root):
    target = CocoDataset(root, "val", masks=False)[0][1]
    assert target.masks is None
    assert target.keypoints is None


def test_images_and_objects_without_annotations(root):
    target = CocoDataset(root, "val", keypoints=True)[2][1]
    assert target.boxes.shape == target.crowds.shape == (0, 4)
    assert target.labels.dtype == torch.int64
    assert (len(target.masks), target.masks.size) == (0, (HEIGHT, WIDTH))
    assert target.keypoints.shape == (0, 3, 3)


def test_training_leaves_out_images_that_are_not_trainable(tmp_path):
    coco = content()
    coco["images"].append(coco["images"][0] | {"id": 13, "file_name": "13.png"})
    coco["annotations"].append(coco["annotations"][2] | {"id": 5, "image_id": 13})  # a crowd alone
    coco["annotations"][3]["keypoints"] = [0] * 9
    write(tmp_path, coco)
    evaluation, training = CocoDataset(tmp_path, "val"), CocoDataset(tmp_path, "val", training=True)
    assert evaluation.image_ids == [10, 7, 12, 13]
    assert evaluation.unannotated == 0
    assert training.image_ids == [10, 7]
    assert "2 images, 2 with nothing to learn from left out; bad data: none" in training.summary()
    assert CocoDataset(tmp_path, "val", training=True, keypoints=True).image_ids == [10]


def test_boxes_are_clipped_within_the_tolerance(tmp_path):
    dataset = open_changed(tmp_path, person(bbox=[-1.5, -2, 34, 27.5]))
    assert dataset[0][1].boxes[0].tolist() == [0, 0, 32, 24]


def test_fields_that_other_tools_omit(tmp_path):
    dataset = open_changed(tmp_path, person(area=None, iscrowd=None, num_keypoints=None), keypoints=True)
    (annotation,) = dataset.ground_truth().loadAnns([1])
    assert annotation["iscrowd"] == 0
    assert annotation["area"] == bitmaps(dataset[0][1].masks)[0].sum()
    assert annotation["num_keypoints"] == 2


def test_ground_truth_is_the_file_as_pycocotools_reads_it(root):
    coco = CocoDataset(root, "val", keypoints=True).ground_truth()
    read = COCO(root / "annotations" / "instances_val.json")
    assert coco.getImgIds() == read.getImgIds()
    for id, annotation in coco.anns.items():
        expected = {"keypoints": [0] * 9, "num_keypoints": 0} | read.anns[id] if id != 3 else read.anns[id]
        for name in ("image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints"):
            assert annotation[name] == expected[name], name
    assert set(coco.cats) == {4, 90}
