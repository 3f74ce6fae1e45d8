"""A small data set in COCO's format, written to disk with or without errors."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from models.data.coco import CocoDataset

HEIGHT, WIDTH = 24, 32
SQUARE = [4, 4, 12, 4, 12, 14, 4, 14]
TRIANGLE = [20.5, 3.25, 30.0, 20.0, 15.0, 18.5]
REGION = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
REGION[5:20, 3:9] = REGION[8:11, 14:30] = 1
RUNS = {"size": [HEIGHT, WIDTH], "counts": [96, 48, 600, 24]}  # columns 4, 5 and the last


def rle(region):
    encoded = coco_mask.encode(region)
    return encoded | {"counts": encoded["counts"].decode()}


def person(**entries):
    """An annotation of image 10, with its fields replaced by `entries` and without those that are None."""
    keypoints = [6, 5, 2, 10, 7, 1, 0, 0, 0]
    annotation = {"id": 1, "image_id": 10, "category_id": 4, "bbox": [4, 4, 8, 10], "area": 80, "iscrowd": 0}
    annotation |= {"segmentation": [SQUARE], "keypoints": keypoints, "num_keypoints": 2}
    return {key: value for key, value in (annotation | entries).items() if value is not None}


def content():
    """The JSON content of three images: one with two objects and a crowd, one with one object, one with none."""
    dog = {"id": 2, "category_id": 90, "bbox": [15, 3.25, 15, 16.75], "segmentation": [TRIANGLE], "keypoints": None}
    crowd = {"id": 3, "bbox": [3, 5, 27, 15], "segmentation": rle(REGION), "iscrowd": 1, "keypoints": [0] * 9}
    last = {"id": 4, "image_id": 7, "segmentation": RUNS, "bbox": [4, 0, 28, 24]}
    names = ["nose", "left_hand", "right_hand"]
    return {
        "images": [{"id": id, "file_name": f"{id}.png", "width": WIDTH, "height": HEIGHT} for id in (10, 7, 12)],
        "annotations": [person(), person(**dog), person(**crowd), person(**last)],
        "categories": [
            {"id": 90, "name": "dog"},
            {"id": 4, "name": "person", "keypoints": names, "skeleton": [[1, 2], [1, 3]]},
        ],
    }


def write(root, coco):
    """Write the JSON content, and a file for each of its images, each of another gray."""
    (root / "annotations").mkdir()
    (root / "val").mkdir()
    (root / "annotations" / "instances_val.json").write_text(json.dumps(coco))
    for gray, image in enumerate(coco["images"]):
        if {"file_name", "width", "height"} <= image.keys():
            Image.new("RGB", (WIDTH, HEIGHT), (gray,) * 3).save(root / "val" / image["file_name"])


def open_changed(root, change, **options):
    """Open the data set after `change(content)`, or with annotation 1 replaced by `change`."""
    coco = content()
    if callable(change):
        change(coco)
    else:
        coco["annotations"][0] = change
    write(root, coco)
    return CocoDataset(root, "val", **options)
