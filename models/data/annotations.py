"""Reading and checking COCO's JSON. Fields in use that are malformed or lie outside their image are reported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from models.data.problems import DataError, Problems
from models.structures import Category

Entry = dict[str, Any]  # an object of the JSON

# The number of pixels by which an annotation may exceed its image, since tools round differently. Boxes are clipped
# later.
TOLERANCE = 2.0


def load(path: Path) -> dict[str, list[Entry]]:
    """Read the lists of images, annotations and categories of a file.

    Args:
        path: of the JSON file.

    Raises:
        DataError: the file does not exist, is not JSON, or is not in COCO's format.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError("missing file", f"{path}: expected COCO's annotations, got no such file") from None
    except ValueError as error:  # invalid JSON or UTF-8
        raise DataError("not COCO", f"{path}: expected JSON, got {error}") from None
    if not isinstance(content, dict):
        raise DataError("not COCO", f"{path}: expected an object, got {type(content).__name__}")
    for name in ("images", "annotations", "categories"):
        entries = content.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError("not COCO", f"{path}: {name}: expected a list of objects, got {_short(entries)}")
    return content


def check_categories(entries: list[Entry], path: Path) -> tuple[Category, ...]:
    """Check the categories and sort them by id: label k is element k - 1.

    Errors are never skipped, because no label could be trusted then.

    Args:
        entries: as in the file.
        path: of the file, for errors.

    Raises:
        DataError: an id, a name, a list of keypoints or a skeleton is malformed, or an id is not unique.
    """
    categories: dict[int, Category] = {}
    for position, entry in enumerate(entries):
        try:
            id, names = _typed(entry, "id", int), entry.get("keypoints", [])
            if id in categories:
                raise DataError("not COCO", f"id: expected unique ones, got {id} twice")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError("not COCO", f"keypoints: expected a list of names, got {_short(names)}")
            skeleton = _skeleton(entry.get("skeleton", []), len(names))
            categories[id] = Category(id, _typed(entry, "name", str), tuple(names), skeleton)
        except DataError as error:
            raise DataError("not COCO", f"{path}: categories[{position}]: {error}") from None
    return tuple(categories[id] for id in sorted(categories))


def _skeleton(pairs: Any, num_keypoints: int) -> tuple[tuple[int, int], ...]:
    try:
        skeleton = tuple((first - 1, second - 1) for first, second in pairs)  # COCO counts from 1
        if all(0 <= point < num_keypoints for pair in skeleton for point in pair):
            return skeleton
    except (TypeError, ValueError):
        pass
    raise DataError("not COCO", f"skeleton: expected pairs of 1..{num_keypoints}, got {_short(pairs)}")


def check_images(entries: list[Entry], path: Path, problems: Problems) -> dict[int, Entry]:
    """Check the images.

    Args:
        entries: as in the file.
        path: of the file, for errors.
        problems: receives the bad images.

    Returns:
        The usable images by id, each with only its id, file name, width and height.

    Raises:
        DataError: an image is bad and `problems` does not skip it.
    """
    images: dict[int, Entry] = {}
    for position, entry in enumerate(entries):
        try:
            image = {name: _typed(entry, name, int) for name in ("id", "width", "height")}
            image |= {"file_name": _typed(entry, "file_name", str)}
            if image["id"] in images:
                raise DataError("duplicate id", f"id: expected unique ones, got {image['id']} twice")
            if image["width"] < 1 or image["height"] < 1:
                raise DataError("malformed image entry", f"width, height: expected positive ones, got {_short(image)}")
            images[image["id"]] = image
        except DataError as error:
            where = f"images[{position}], id {_short(entry.get('id'))}"
            problems.add(DataError(error.kind, f"{path}: {where}: {error}"))
    return images


def check_annotations(
    entries: list[Entry],
    path: Path,
    problems: Problems,
    images: Mapping[int, Entry],
    categories: tuple[Category, ...],
    *,
    masks: bool,
    num_keypoints: int,
) -> dict[int, list[Entry]]:
    """Check the annotations.

    Args:
        entries: as in the file.
        path: of the file, for errors.
        problems: receives the bad annotations.
        images: from `check_images`.
        categories: from `check_categories`.
        masks: whether segmentations are used.
        num_keypoints: the number of keypoints of an object; 0 if keypoints are not used.

    Returns:
        The usable annotations of each image by the image's id, with only the fields in use.

    Raises:
        DataError: an annotation is bad and `problems` does not skip it.
    """
    annotations: dict[int, list[Entry]] = {id: [] for id in images}
    category_ids = {category.id for category in categories}
    seen: set[int] = set()
    for entry in entries:
        try:
            id, image_id = _typed(entry, "id", int), _typed(entry, "image_id", int)
            if id in seen:
                raise DataError("duplicate id", f"id: expected unique ones, got {id} twice")
            seen.add(id)
            if image_id not in images:
                raise DataError("unknown image", "image_id: expected the id of a usable image of this file")
            if (category := _typed(entry, "category_id", int)) not in category_ids:
                raise DataError("unknown category", f"category_id: expected a category of this file, got {category}")
            annotations[image_id].append(_checked(entry, images[image_id], masks, num_keypoints))
        except DataError as error:
            where = f"annotation {_short(entry.get('id'))} of image {_short(entry.get('image_id'))}"
            problems.add(DataError(error.kind, f"{path}: {where}: {error}"))
    return annotations


def to_rle(segmentation: Any, height: int, width: int) -> Any:
    """Convert a segmentation to COCO's compressed RLE.

    Args:
        segmentation: polygons, uncompressed RLE or compressed RLE, as in the file.
        height, width: of the image, in pixels.
    """
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def _checked(entry: Entry, image: Entry, masks: bool, num_keypoints: int) -> Entry:
    """Check the fields in use of one annotation, and fill in missing ones that can be derived."""
    height, width = image["height"], image["width"]
    used = {name: entry[name] for name in ("id", "image_id", "category_id")}
    used["iscrowd"] = int(bool(entry.get("iscrowd", 0)))  # other tools often omit it, and the area
    used["bbox"] = _box(entry.get("bbox"), height, width)
    if masks:
        used["segmentation"] = _segmentation(entry.get("segmentation"), height, width)
    if num_keypoints:
        used["keypoints"] = _keypoints(entry.get("keypoints"), num_keypoints, height, width)
        used["num_keypoints"] = sum(visibility > 0 for visibility in used["keypoints"][2::3])
    if "area" in entry:
        (used["area"],) = _numbers("area", [entry["area"]])
    elif masks:
        used["area"] = float(coco_mask.area(to_rle(used["segmentation"], height, width)))
    else:
        used["area"] = used["bbox"][2] * used["bbox"][3]
    return used


def _box(box: Any, height: int, width: int) -> list[float]:
    x, y, w, h = _numbers("bbox", box, 4)
    if w <= 0 or h <= 0:
        raise DataError("zero-area box", f"bbox: expected a positive width and height, got {box}")
    inside = _within([x, x + w], width) and _within([y, y + h], height)
    overlaps = x < width and y < height and x + w > 0 and y + h > 0  # a box within the tolerance may be outside
    if not inside or not overlaps:
        raise DataError("outside the image", f"bbox: expected it in {width} x {height} pixels, got {box}")
    return box


def _segmentation(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        if not segmentation:
            raise DataError("empty polygon", "segmentation: expected polygons, got none")
        for polygon in segmentation:
            _numbers("segmentation", polygon)
            if len(polygon) < 6 or len(polygon) % 2:
                raise DataError(
                    "empty polygon", f"segmentation: expected x, y of 3 points or more, got {_short(polygon)}"
                )
            # The memory to rasterise a polygon grows with its distance from the image.
            if not (_within(polygon[::2], width) and _within(polygon[1::2], height)):
                wrong = _short(polygon)
                raise DataError("outside the image", f"segmentation: expected {width} x {height} pixels, got {wrong}")
    elif isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width] or not _fills(counts, height * width):
            wrong = f"size {_short(size)}, counts {_short(counts)}"
            raise DataError("malformed RLE", f"segmentation: expected runs that fill {[height, width]}, got {wrong}")
    else:
        raise DataError("no segmentation", f"segmentation: expected polygons or RLE, got {_short(segmentation)}")
    return segmentation


def _keypoints(keypoints: Any, num_keypoints: int, height: int, width: int) -> list[float]:
    if keypoints is None:  # the category has none: all are unlabelled
        return [0] * (3 * num_keypoints)
    _numbers("keypoints", keypoints, 3 * num_keypoints)
    labelled = [(x, y) for x, y, v in zip(keypoints[::3], keypoints[1::3], keypoints[2::3], strict=True) if v]
    if not set(keypoints[2::3]) <= {0, 1, 2}:
        raise DataError("malformed keypoints", f"keypoints: expected visibilities of 0, 1, 2, got {keypoints[2::3]}")
    if labelled and not (_within([x for x, _ in labelled], width) and _within([y for _, y in labelled], height)):
        raise DataError("outside the image", f"keypoints: expected {width} x {height} pixels, got {_short(labelled)}")
    return keypoints


def _numbers(name: str, values: Any, count: int | None = None) -> list[float]:
    try:  # the cheapest check of all values: the sum is finite only if each value is a finite number
        if isinstance(values, list) and len(values) == (count or len(values)) and math.isfinite(sum(values)):
            return values
    except (TypeError, OverflowError):
        pass
    expected = "numbers" if count is None else f"{count} numbers"
    raise DataError(f"malformed {name}", f"{name}: expected {expected}, got {_short(values)}")


def _within(values: list[float], size: int) -> bool:
    return min(values) >= -TOLERANCE and max(values) <= size + TOLERANCE


def _fills(counts: Any, pixels: int) -> bool:
    """Whether the runs add up to the image's pixels. If not, pycocotools would access memory out of bounds."""
    if isinstance(counts, list):
        return all(type(count) is int and count >= 0 for count in counts) and sum(counts) == pixels
    if not isinstance(counts, str) or not counts or not counts.isascii():
        return False
    # Each character holds 5 bits of a number, the lowest first, and a 6th bit that is set if more follow. From the
    # fourth on, each number is the difference from the last but one.
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        return False
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # a 32-bit number has at most 7 characters
        return False
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)  # two's complement
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return bool((runs >= 0).all() and runs.sum() == pixels)


def _typed(entry: Entry, name: str, kind: type) -> Any:
    value = entry.get(name)
    if type(value) is not kind:  # isinstance would accept a bool as an int
        raise DataError(f"malformed {name}", f"{name}: expected {kind.__name__}, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
