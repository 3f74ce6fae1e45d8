"""Data sets in COCO's format: images with their ground truth."""

from __future__ import annotations

import contextlib
import gc
import io
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from fastmask import Masks
from fastmask.box_ops import clip
from models.data import annotations as coco_json
from models.data.image_io import read_image
from models.data.problems import DataError, Problems
from models.structures import Target

# COCO's keypoints are pixel indices. Targets and detections are in continuous coordinates, where the centre of pixel i
# is at i + 0.5. The offset is added on reading and subtracted on writing in COCO's format.
PIXEL_CENTRE = 0.5


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Disable Python's garbage collector, which would repeatedly traverse millions of new objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images with their ground truth, from `root/annotations/<annotations>_<split>.json` and `root/<split>/`.

    The constructor checks all annotations; images are checked when they are read. Bad annotations raise an error, or
    are left out and counted in `problems`.

    Attributes:
        categories: in the order of their ids; label k is `categories[k - 1]`.
        keypoint_names: of the categories with keypoints, which all have the same; empty unless `keypoints` is set.
        image_ids: COCO's id of each image.
        sizes: `[N, 2]` int64, (height, width) of each image.
        unannotated: number of images left out of training because nothing can be learnt from them.
        problems: the bad data so far.
    """

    @_no_garbage()
    def __init__(
        self,
        root: Path,
        split: str,
        annotations: str = "instances",
        *,
        training: bool = False,
        masks: bool = True,
        keypoints: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        """Read and check the annotations.

        Args:
            root: folder of the data set.
            split: such as "train2017": the folder of the images, and the end of the annotation file's name.
            annotations: the beginning of the annotation file's name.
            training: whether to leave out images without an annotation to learn from, as is usual for COCO.
            masks: whether targets have masks.
            keypoints: whether targets have keypoints.
            on_error: "raise" stops at bad annotations and images; "skip" leaves them out and counts them.

        Raises:
            DataError: the file is missing or not in COCO's format, no image is left, or `on_error` is "raise" and an
                annotation is bad.
        """
        self.folder = Path(root) / split
        self.path = Path(root) / "annotations" / f"{annotations}_{split}.json"
        self.problems = Problems(on_error)
        self.masks = masks
        content = coco_json.load(self.path)
        self.categories = coco_json.check_categories(content["categories"], self.path)
        self.keypoint_names = self._keypoint_names() if keypoints else ()
        images = coco_json.check_images(content["images"], self.path, self.problems)
        by_image = coco_json.check_annotations(
            content["annotations"],
            self.path,
            self.problems,
            images,
            self.categories,
            masks=masks,
            num_keypoints=len(self.keypoint_names),
        )
        selected = [image for id, image in images.items() if not training or self._is_trainable(by_image[id])]
        if not selected:
            expected = "an image with an annotation" if training else "an image"
            raise DataError("no images", f"{self.path}: expected {expected}, got none")
        self.unannotated = len(images) - len(selected)
        self.image_ids = [image["id"] for image in selected]
        self.sizes = torch.tensor([(image["height"], image["width"]) for image in selected])
        self._entries = _Packed((image, by_image[image["id"]]) for image in selected)
        self._labels = {category.id: label for label, category in enumerate(self.categories, start=1)}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Read an image, uint8 RGB `[3, H, W]`, and its ground truth in pixels of the image.

        Raises:
            DataError: the image is missing, damaged, or not of the annotated size.
        """
        entry, annotations = self._entries[index]
        return self._read(entry), self._target(entry, annotations)

    def image(self, index: int) -> Tensor:
        """Read an image without its ground truth.

        Raises:
            DataError: as for `dataset[index]`.
        """
        return self._read(self._entries[index][0])

    @_no_garbage()
    def ground_truth(self) -> COCO:
        """The images and their usable annotations as a pycocotools object, for `COCOeval`."""
        entries = [self._entries[index] for index in range(len(self))]
        coco: Any = COCO()
        coco.dataset = {
            "images": [image for image, _ in entries],
            "annotations": [annotation for _, annotations in entries for annotation in annotations],
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
        }
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco.createIndex()
        return coco

    def summary(self) -> str:
        """Text with the number of images, the number of images left out, and the bad data by kind."""
        left_out = f", {self.unannotated} with nothing to learn from left out" if self.unannotated else ""
        return f"{self.path}: {len(self)} images{left_out}; {self.problems.summary()}"

    def _keypoint_names(self) -> tuple[str, ...]:
        """The keypoints of the categories that have any; they must be the same for all of these."""
        names = {category.keypoints for category in self.categories if category.keypoints}
        if len(names) != 1:
            owners = [category.name for category in self.categories if category.keypoints]
            raise DataError(
                "no keypoints", f"{self.path}: categories: expected one list of keypoints, got {len(names)} ({owners})"
            )
        return names.pop()

    def _is_trainable(self, annotations: list[coco_json.Entry]) -> bool:
        """Whether an image has an object to learn from; with keypoints, one with a labelled keypoint (Detectron)."""
        objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
        return any(annotation["num_keypoints"] for annotation in objects) if self.keypoint_names else bool(objects)

    def _read(self, entry: coco_json.Entry) -> Tensor:
        """Read an image and check its size."""
        path, height, width = self.folder / entry["file_name"], entry["height"], entry["width"]
        try:
            image = read_image(path)
        except DataError as error:
            raise DataError(error.kind, f"image {entry['id']}: {error}") from None
        if image.shape[1:] != (height, width):
            got = f"{image.shape[2]} x {image.shape[1]}"
            text = f"image {entry['id']}: {path}: expected {width} x {height} pixels as annotated, got {got}"
            raise DataError("image of another size", text)
        return image

    def _target(self, entry: coco_json.Entry, annotations: list[coco_json.Entry]) -> Target:
        """Make the ground truth of an image from its checked annotations."""
        height, width = entry["height"], entry["width"]
        objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
        crowds = [annotation for annotation in annotations if annotation["iscrowd"]]
        masks = None
        if self.masks:  # never as bitmaps of the image's size: 500 objects of 8000 x 4000 pixels would take 16 GB
            masks = Masks.from_coco([annotation["segmentation"] for annotation in objects], (height, width))
        return Target(
            boxes=_boxes(objects, height, width),
            labels=torch.tensor([self._labels[annotation["category_id"]] for annotation in objects], dtype=torch.int64),
            crowds=_boxes(crowds, height, width),
            masks=masks,
            keypoints=_keypoints(objects, len(self.keypoint_names)) if self.keypoint_names else None,
            image_id=entry["id"],
        )


class _Packed:
    """A read-only list of Python objects, pickled into one tensor.

    Worker processes share the tensor's memory. Ordinary objects would be copied into each process, because reading one
    changes its reference count, which writes to the shared page.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        pieces = [pickle.dumps(value) for value in values]
        self._ends = torch.tensor([0, *map(len, pieces)]).cumsum(0)
        self._bytes = torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8)

    def __getitem__(self, index: int) -> Any:
        start, end = self._ends[index : index + 2].tolist()
        return pickle.loads(self._bytes[start:end].numpy().tobytes())


def _boxes(annotations: list[coco_json.Entry], height: int, width: int) -> Tensor:
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32).reshape(-1, 4)
    return clip(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), (height, width))


def _keypoints(annotations: list[coco_json.Entry], num_keypoints: int) -> Tensor:
    values = [annotation["keypoints"] for annotation in annotations]
    keypoints = torch.tensor(values, dtype=torch.float32).reshape(-1, num_keypoints, 3)
    keypoints[..., :2] += PIXEL_CENTRE * (keypoints[..., 2:] > 0)  # unlabelled keypoints stay zero
    return keypoints
