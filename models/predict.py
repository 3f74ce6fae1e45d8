"""Detections of pictures: `python -m models.predict --checkpoint FILE IMAGE...`.

Beside NAME.jpg, or in `--output`, come NAME.detections.jpg, drawn, and NAME.detections.json, in the picture's pixels
as its EXIF orientation shows it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from models.data.image_io import read_image
from models.data.problems import DataError
from models.evaluate import Detector, coco_results
from models.structures import Category, Detections
from models.visualize import draw
from models.weights.checkpoint import load_model

SUFFIXES = {".jpg", ".jpeg", ".png"}
MARK = ".detections"  # in the names of what is written: never an input


@dataclass(frozen=True)
class PredictConfig:
    """Detects in pictures; writes NAME.detections.jpg (or .png, of a PNG) and NAME.detections.json of each."""

    images: tyro.conf.Positional[tuple[Path, ...]]  # pictures, and folders of them
    checkpoint: Path
    output: Path | None = None  # a folder; none: beside each picture
    score_threshold: float = 0.5
    on_error: Literal["raise", "skip"] = "raise"  # an unreadable picture stops, or is listed at the end


def predict(
    model: Detector,
    categories: Sequence[Category],
    pictures: Sequence[Path],
    output: Path | None = None,
    *,
    score_threshold: float = 0.5,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[DataError]:
    """Detects in each picture and writes what is found.

    Args:
        model: in evaluation mode.
        categories: label k is `categories[k - 1]`.
        pictures: from `find_pictures`.
        output: a folder, made if need be; beside each picture if None.
        score_threshold: lowest score that is written.
        on_error: whether an unreadable picture raises, or is left out and returned.

    Returns:
        What could not be read, each error naming its file.
    """
    targets = _targets(pictures, output)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    errors: list[DataError] = []
    for picture, target in tqdm(targets.items(), desc="predict", unit="image"):
        try:
            image = read_image(picture)
        except DataError as error:
            if on_error == "raise":
                raise
            errors.append(error)
            continue
        (detections,) = model.detect([image])
        detections = detections[detections.scores >= score_threshold]
        drawn = to_pil_image(draw(image, detections, categories))
        suffix = ".png" if picture.suffix.lower() == ".png" else ".jpg"
        drawn.save(target.with_name(target.name + suffix), quality=92)
        text = json.dumps(describe(detections, categories, picture.name))
        target.with_name(target.name + ".json").write_text(text)
    return errors


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """The pictures among files and in folders, not in theirs, without those that `predict` has written."""
    pictures = []
    for path in paths:
        if path.is_dir():
            pictures += sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        else:
            pictures.append(path)
    return [picture for picture in dict.fromkeys(pictures) if not picture.stem.endswith(MARK)]


def describe(detections: Detections, categories: Sequence[Category], name: str) -> dict[str, Any]:
    """A picture's detections for JSON: COCO's fields, bbox being x, y, width and height, and the category's name."""
    height, width = detections.image_size
    names = {category.id: category.name for category in categories}
    found = [{"category": names[entry["category_id"]], **entry} for entry in coco_results(detections, categories)]
    return {"image": name, "height": height, "width": width, "detections": found}


def _targets(pictures: Iterable[Path], output: Path | None) -> dict[Path, Path]:
    """Where each picture's results go, without the suffix."""
    sources: dict[Path, Path] = {}
    for picture in pictures:
        target = (output or picture.parent) / (picture.stem + MARK)
        if target in sources:
            raise ValueError(f"pictures: expected one for {target}, got {sources[target]} and {picture}")
        sources[target] = picture
    return {picture: target for target, picture in sources.items()}


def main(config: PredictConfig) -> None:
    pictures = find_pictures(config.images)
    if not pictures:
        sys.exit(f"images: expected pictures or folders with some, got none in {[*map(str, config.images)]}")
    model, categories = load_model(config.checkpoint)
    try:
        errors = predict(
            model,
            categories,
            pictures,
            config.output,
            score_threshold=config.score_threshold,
            on_error=config.on_error,
        )
    except DataError as error:
        sys.exit(f"error: {error}")
    if errors:
        sys.exit("\n".join([f"{len(errors)} of {len(pictures)} pictures left out:", *map(str, errors)]))


if __name__ == "__main__":
    main(tyro.cli(PredictConfig))
