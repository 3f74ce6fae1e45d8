"""A synthetic data set in COCO's layout: `python -m models.data.synthetic.shapes --output DIR`.

The images, from `scenes`, show overlapping textured shapes and people with COCO's 17 keypoints. The segmentation is
polygons if an object is completely visible, compressed RLE if not, and uncompressed RLE for a crowd.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from models.data.coco import PIXEL_CENTRE
from models.data.synthetic import scenes
from models.data.synthetic.figures import KEYPOINTS, SKELETON

# The ids have gaps, like those of COCO: an id is not a label.
CATEGORY_IDS = dict(zip(scenes.CATEGORIES, (1, 3, 4, 8, 9), strict=True))
SPLITS = ("train2017", "val2017")
SETTINGS = "shapes.json"  # in the data set's folder: the settings and the code that generated it
SOURCES = ("figures.py", "scenes.py", "shapes.py")  # the code that the images depend on
JPEG_QUALITY = 92


@dataclass(frozen=True)
class ShapesConfig:
    """The data set to generate."""

    output: Path
    train: int = 1500  # images
    val: int = 200
    sides: tuple[int, int] = (240, 320)  # minimum and maximum of height and width, in pixels
    objects: tuple[int, int] = (3, 9)  # minimum and maximum in an image
    seed: int = 0

    def __post_init__(self):
        for name, (least, most) in (("sides", self.sides), ("objects", self.objects)):
            if not 0 < least <= most:
                raise ValueError(f"{name}: expected 0 < least <= most, got {least} {most}")


def ensure(config: ShapesConfig) -> None:
    """Generate the data set, unless the folder has one that was generated with the same settings and code.

    Args:
        config: the folder and the settings.

    Raises:
        ValueError: as for `generate`.
    """
    settings = config.output / SETTINGS
    if not (settings.exists() and settings.read_text() == _settings(config)):
        generate(config)


def generate(config: ShapesConfig) -> None:
    """Write the data set, replacing an earlier one. The folder appears only when it is complete.

    Args:
        config: the folder and the settings.

    Raises:
        ValueError: the folder has files that are no generated data set.
    """
    output = config.output.resolve()
    if output.exists() and any(output.iterdir()) and not (output / SETTINGS).exists():
        raise ValueError(f"output: expected a new folder or one with {SETTINGS}, got {output}, which has other files")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch, "new")
        (folder / "annotations").mkdir(parents=True)
        for split, count in zip(SPLITS, (config.train, config.val), strict=True):
            _write(config, folder, split, count)
        (folder / SETTINGS).write_text(_settings(config))
        if output.exists():
            output.rename(Path(scratch, "old"))
        folder.rename(output)


def scene(config: ShapesConfig, split: str, index: int) -> tuple[Image.Image, list[scenes.Instance]]:
    """Draw one image.

    Args:
        config: seed and ranges. The image does not depend on the numbers of images.
        split: one of `SPLITS`.
        index: of the image in its split.

    Returns:
        The image, and its objects from back to front.
    """
    rng = np.random.default_rng((config.seed, SPLITS.index(split), index))
    return scenes.draw(rng, config.sides, config.objects)


def annotation(instance: scenes.Instance) -> dict[str, Any]:
    """Annotate an object in COCO's format.

    Args:
        instance: the object.

    Returns:
        The annotation without `id` and `image_id`; a person's has keypoints.
    """
    height, width = instance.mask.shape
    rle: Any = coco_mask.encode(np.asfortranarray(instance.mask, np.uint8))
    segmentation: Any = {"size": [height, width], "counts": rle["counts"].decode()}
    if instance.crowd:
        segmentation["counts"] = _runs(instance.mask)
    elif instance.outline:
        segmentation = [polygon.round(2).ravel().tolist() for polygon in instance.outline]
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    entry = {
        "category_id": CATEGORY_IDS[instance.category],
        "iscrowd": int(instance.crowd),
        "segmentation": segmentation,
        "area": float(coco_mask.area(rle)),
        "bbox": coco_mask.toBbox(rle).tolist(),
    }
    if instance.category == "person":
        keypoints = np.zeros((len(KEYPOINTS), 3)) if instance.keypoints is None else instance.keypoints
        keypoints = keypoints - (keypoints[:, 2:] > 0) * (PIXEL_CENTRE, PIXEL_CENTRE, 0)
        entry |= {
            "keypoints": keypoints.round(1).ravel().tolist(),
            "num_keypoints": int((keypoints[:, 2] > 0).sum()),
        }
    return entry


def _runs(mask: np.ndarray) -> list[int]:
    """The run lengths of a mask, column by column: alternately of zeros and ones, zeros first."""
    values = mask.ravel("F").astype(np.int8)
    ends = np.flatnonzero(np.diff(values, prepend=0, append=-1))
    return np.diff(ends, prepend=0).tolist()


def _write(config: ShapesConfig, folder: Path, split: str, count: int) -> None:
    """Write the images and both annotation files of a split."""
    images, entries = [], []
    (folder / split).mkdir()
    for index in tqdm(range(count), f"generating {split}", unit="image"):
        image, instances = scene(config, split, index)
        name = f"{index + 1:012d}.jpg"
        image.save(folder / split / name, quality=JPEG_QUALITY)
        images.append({"id": index + 1, "file_name": name, "height": image.height, "width": image.width})
        for instance in instances:
            entries.append({"id": len(entries) + 1, "image_id": index + 1, **annotation(instance)})

    categories = [{"id": id, "name": name, "supercategory": "shape"} for name, id in CATEGORY_IDS.items()]
    person = {**categories[0], "keypoints": list(KEYPOINTS), "skeleton": SKELETON}
    people = [entry for entry in entries if "keypoints" in entry]
    plain = [{k: v for k, v in entry.items() if k not in ("keypoints", "num_keypoints")} for entry in entries]
    for task, listed, kinds in (("instances", plain, categories), ("person_keypoints", people, [person])):
        content = {
            "info": {"description": "Generated shapes"},
            "licenses": [],
            "images": images,
            "annotations": listed,
            "categories": kinds,
        }
        (folder / "annotations" / f"{task}_{split}.json").write_text(json.dumps(content))


def _settings(config: ShapesConfig) -> str:
    """Everything that the data set depends on, as JSON: the config without the folder, and a hash of the code."""
    code = b"".join(Path(__file__).with_name(name).read_bytes() for name in SOURCES)
    settings = {**asdict(config), "code": hashlib.sha256(code).hexdigest()}
    del settings["output"]
    return json.dumps(settings, indent=2)


if __name__ == "__main__":
    ensure(tyro.cli(ShapesConfig, description=__doc__))
