"""Images and polygons in COCO's format, of COCO's or of larger sizes, drawn at random and written to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write(root: Path, split: str, size: tuple[int, int], *, images: int, objects: int, largest: float = 300) -> None:
    """Write `root/split/*.jpg` and `root/annotations/instances_<split>.json`.

    Args:
        root: of the data set.
        split: its part.
        size: (height, width) of the images.
        images: how many.
        objects: in each image, with polygons of 15 to 60 vertices.
        largest: the longest side of an object, in pixels.
    """
    random = np.random.default_rng(0)
    height, width = size
    for folder in (root / split, root / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    records, annotations = [], []
    for index in range(images):
        coarse = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(root / split / f"{index}.jpg")
        records.append({"id": index + 1, "file_name": f"{index}.jpg", "height": height, "width": width})
        for _ in range(objects):
            annotations.append(
                _polygon(random, width, height, largest) | {"id": len(annotations) + 1, "image_id": index + 1}
            )
    content = {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _polygon(random: np.random.Generator, width: int, height: int, largest: float) -> dict[str, Any]:
    """An annotation with a star-shaped polygon."""
    sides = random.uniform(0.1 * largest, largest, 2)
    corner = random.uniform(0, np.array([width, height]) - sides)
    angle = np.sort(random.uniform(0, 2 * np.pi, random.integers(15, 61)))
    radius = random.uniform(0.3, 0.5, len(angle))
    vertices = corner + sides * (0.5 + radius * np.stack([np.cos(angle), np.sin(angle)])).T
    low, high = vertices.min(0), vertices.max(0)
    return {
        "category_id": 1,
        "iscrowd": 0,
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(np.prod(high - low) / 2),
        "segmentation": [vertices.round(2).flatten().tolist()],
    }
