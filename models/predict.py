"""Detections in images: `python -m models.predict --checkpoint FILE IMAGE...`.

For each NAME.jpg, writes NAME.detections.jpg, with the detections drawn, and NAME.detections.json, beside the image or
in `--output`. Coordinates are pixels of the image turned upright by its EXIF orientation. With `--benchmark N`, times N
calls for each image instead.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from models.coco_eval import Detector, coco_results
from models.data.image_io import read_image
from models.data.problems import DataError
from models.stage_times import stage_times
from models.structures import Category, Detections
from models.visualize import draw
from models.weights.checkpoint import load_model

SUFFIXES = {".jpg", ".jpeg", ".png"}
OUTPUT_MARK = ".detections"  # in the names of output files; files with such a name are not read
PAPER_MS = 195, 15  # of R-101-FPN on a Tesla M40: the network, and resizing of masks on the CPU (§4.4)
UNTIMED_CALLS = 2  # the first ones compile and allocate


@dataclass(frozen=True)
class PredictConfig:
    """Detect in images; writes NAME.detections.jpg (.png for a PNG) and NAME.detections.json for each."""

    images: tyro.conf.Positional[tuple[Path, ...]]  # images, and folders of images
    checkpoint: Path
    output: Path | None = None  # a folder; None writes beside each image
    score_threshold: float = 0.5
    on_error: Literal["raise", "skip"] = "raise"  # stop at an unreadable image, or leave it out and list it at the end
    benchmark: int = 0  # if not 0, time so many calls for each image, print them by stage, and write nothing


def predict(
    model: Detector,
    categories: Sequence[Category],
    images: Sequence[Path],
    output: Path | None = None,
    *,
    score_threshold: float = 0.5,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[DataError]:
    """Detect in each image, draw the detections, and write the drawing and the detections as JSON.

    Args:
        model: in evaluation mode.
        categories: label k is `categories[k - 1]`.
        images: files, from `find_images`.
        output: a folder, created if it does not exist; None writes beside each image.
        score_threshold: detections with a lower score are left out.
        on_error: "raise" stops at an unreadable image, "skip" leaves it out.

    Returns:
        One error, which names the file, for each image that was left out.

    Raises:
        DataError: an image is unreadable, unless `on_error` is "skip".
        ValueError: two images have the same output file.
    """
    targets = _targets(images, output)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    errors: list[DataError] = []
    for path, target in tqdm(targets.items(), desc="predict", unit="image"):
        try:
            image = read_image(path)
        except DataError as error:
            if on_error == "raise":
                raise
            errors.append(error)
            continue
        (detections,) = model.detect([image])
        detections = detections[detections.scores >= score_threshold]
        drawn = to_pil_image(draw(image, detections, categories))
        suffix = ".png" if path.suffix.lower() == ".png" else ".jpg"
        drawn.save(target.with_name(target.name + suffix), quality=92)
        text = json.dumps(describe(detections, categories, path.name))
        target.with_name(target.name + ".json").write_text(text)
    return errors


def benchmark(model: Detector, path: Path, calls: int) -> str:
    """Time detection in an image, from its uint8 pixels to boxes, scores and run-length encoded masks on the host.

    Args:
        model: in evaluation mode.
        path: of the image. Reading it is not timed.
        calls: the number of timed calls, at least 1.

    Returns:
        Text: the median, the shortest and the longest call, images a second, the median beside the paper's, and the
        stages of one more call (the medians of three on a GPU).

    Raises:
        DataError: the image is unreadable.
        ValueError: `calls` is below 1.
    """
    if calls < 1:
        raise ValueError(f"calls: expected at least 1, got {calls}")
    image = read_image(path)

    def detect() -> Detections:
        (detections,) = model.detect([image])
        if detections.mask_probabilities is not None:
            detections.rle()
        if detections.boxes.is_cuda:
            torch.cuda.synchronize()
        return detections

    found = [detect() for _ in range(UNTIMED_CALLS)][-1]
    milliseconds = []
    for _ in range(calls):
        start = time.perf_counter()
        detect()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    median = statistics.median(milliseconds)
    stages = stage_times(detect, found.boxes.device.type)
    total = sum(stages.values())
    return "\n".join(
        [
            f"{path}: {image.shape[1]} x {image.shape[2]} pixels on {found.boxes.device}, {len(found)} detections",
            f"  {median:.1f} ms, from {min(milliseconds):.1f} to {max(milliseconds):.1f}; {1e3 / median:.2f} images/s",
            f"  the paper's {PAPER_MS[0]} + {PAPER_MS[1]} ms are {sum(PAPER_MS) / median:.2f} times as long",
            *(f"  {stage:<10} {spent:9.2f} ms {spent / total:6.1%}" for stage, spent in stages.items()),
        ]
    )


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The image files to detect in, without duplicates and without output files of `predict`.

    Args:
        paths: files, and folders; of a folder, all images are taken, without those of subfolders.
    """
    images = []
    for path in paths:
        if path.is_dir():
            images += sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        else:
            images.append(path)
    return [image for image in dict.fromkeys(images) if not image.stem.endswith(OUTPUT_MARK)]


def describe(detections: Detections, categories: Sequence[Category], name: str) -> dict[str, Any]:
    """Describe one image's detections for JSON: the fields of COCO's results, and the names of categories.

    Args:
        detections: in pixels of the image.
        categories: label k is `categories[k - 1]`.
        name: of the image file.
    """
    height, width = detections.image_size
    names = {category.id: category.name for category in categories}
    entries = [{"category": names[result["category_id"]], **result} for result in coco_results(detections, categories)]
    return {"image": name, "height": height, "width": width, "detections": entries}


def _targets(images: Iterable[Path], output: Path | None) -> dict[Path, Path]:
    """The output path of each image, without a suffix."""
    sources: dict[Path, Path] = {}
    for image in images:
        target = (output or image.parent) / (image.stem + OUTPUT_MARK)
        if target in sources:
            raise ValueError(f"images: expected one for {target}, got {sources[target]} and {image}")
        sources[target] = image
    return {image: target for target, image in sources.items()}


def main(config: PredictConfig) -> None:
    """Detect in the configured images, and exit with an error if there are none or any was left out."""
    images = find_images(config.images)
    if not images:
        sys.exit(f"images: expected images or folders with some, got none in {[*map(str, config.images)]}")
    if config.benchmark < 0:
        sys.exit(f"benchmark: expected 0 or more calls, got {config.benchmark}")
    model, categories = load_model(config.checkpoint)
    try:
        if config.benchmark:
            for image in images:
                print(benchmark(model, image, config.benchmark))
            return
        errors = predict(
            model,
            categories,
            images,
            config.output,
            score_threshold=config.score_threshold,
            on_error=config.on_error,
        )
    except DataError as error:
        sys.exit(f"error: {error}")
    if errors:
        sys.exit("\n".join([f"{len(errors)} of {len(images)} images left out:", *map(str, errors)]))


if __name__ == "__main__":
    main(tyro.cli(PredictConfig))
