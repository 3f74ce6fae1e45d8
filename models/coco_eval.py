"""COCO's evaluation: detections of a data set in COCO's format, and their average precision by pycocotools.

Each image's detections are reduced to results (boxes, scores, run-length encoded masks) before the next image is read,
so that only results accumulate. The processes of a `torchrun` share the images; the first one merges the results and
scores them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from models.config import DataConfig, ModelConfig
from models.data.coco import PIXEL_CENTRE, CocoDataset
from models.data.datasets import check_model_categories
from models.data.loader import BadSample, eval_loader
from models.distributed import broadcast, gather, rank, world
from models.structures import Category, Detections

Task = Literal["bbox", "segm", "keypoints"]
Metrics = dict[Task, dict[str, float]]  # for each task the values of `COLUMNS`, in 0..1
Result = dict[str, Any]  # a detection in COCO's submission format

COLUMNS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")

# The fields of a result that each task reads. Masks are scored without the box, from which pycocotools would otherwise
# take the area of the mask.
FIELDS: dict[Task, tuple[str, ...]] = {
    "bbox": ("bbox",),
    "segm": ("segmentation",),
    "keypoints": ("keypoints", "bbox"),
}


class Detector(Protocol):
    """The interface that evaluation and prediction use of a model: that of `MaskRCNN`."""

    @property
    def config(self) -> ModelConfig:
        """The branches of the model decide which tasks are scored."""
        ...

    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections of each image, as `MaskRCNN.detect` returns them."""
        ...


def evaluate(
    model: Detector,
    categories: Sequence[Category],
    dataset: CocoDataset,
    data: DataConfig,
    output: Path | None = None,
    *,
    amp: bool = True,
) -> Metrics:
    """Detect in all images of a data set and score the detections. Each process detects in its share of the images.

    Args:
        model: in evaluation mode.
        categories: of the model's labels: label k is `categories[k - 1]`. They are matched to the data set's by id.
        dataset: images and ground truth.
        data: the number of worker processes.
        output: folder for `detections.json`, in COCO's submission format, and `metrics.json`.
        amp: bfloat16 on CUDA.

    Returns:
        AP, AP50, AP75, AP_S, AP_M and AP_L (no AP_S of keypoints) for each task that the model has a branch for, in
        0..1, or -1 where the data set has no such objects. The same in every process.

    Raises:
        ValueError: the model lacks a category of the data set.
        DataError: an image is bad, unless the data set was opened with `on_error="skip"`.
    """
    check_model_categories(categories, dataset)
    results: list[Result] = []
    image_ids: list[int] = []
    loader = eval_loader(dataset, data, rank=rank(), world=world())
    for sample in tqdm(loader, desc="evaluate", unit="image", disable=rank() > 0):
        if isinstance(sample, BadSample):
            continue  # counted in dataset.problems
        image, image_id = sample
        with torch.autocast("cuda", torch.bfloat16, enabled=amp and torch.cuda.is_available()):
            (detections,) = model.detect([image])
        results += [{"image_id": image_id, **result} for result in coco_results(detections, categories)]
        image_ids.append(image_id)

    metrics: Metrics = {}
    if shares := gather((results, image_ids, dataset.problems)):  # the first process
        results = sorted((result for share in shares for result in share[0]), key=lambda result: result["image_id"])
        image_ids = sorted(image_id for share in shares for image_id in share[1])
        for share in shares[1:]:
            dataset.problems.merge(share[2])
        truth = dataset.ground_truth()
        metrics = {
            task: average_precision(truth, results, image_ids, task, categories) for task in _tasks(model.config)
        }
        if output is not None:
            skipped = len(dataset) - len(image_ids)
            output.mkdir(parents=True, exist_ok=True)
            _write_json(output / "detections.json", results)
            _write_json(output / "metrics.json", {"images": len(image_ids), "skipped": skipped, **metrics})
    return broadcast(metrics)


def coco_results(detections: Detections, categories: Sequence[Category]) -> list[Result]:
    """One image's detections in COCO's submission format, best first, without `image_id`.

    Args:
        detections: in pixels of the image.
        categories: label k is `categories[k - 1]`.
    """
    detected = [categories[label - 1] for label in detections.labels.tolist()]
    boxes = box_convert(detections.boxes, "xyxy", "xywh").tolist()
    results: list[Result] = [
        {"category_id": category.id, "bbox": box, "score": score}
        for category, box, score in zip(detected, boxes, detections.scores.tolist(), strict=True)
    ]
    if detections.mask_probabilities is not None:
        for result, rle in zip(results, detections.rle(), strict=True):
            result["segmentation"] = rle
    if detections.keypoints is not None:
        indices = detections.keypoints - detections.keypoints.new_tensor([PIXEL_CENTRE, PIXEL_CENTRE, 0])
        for result, category, points in zip(results, detected, indices.flatten(1).tolist(), strict=True):
            if category.keypoints:
                result["keypoints"] = points
    return results


def average_precision(
    truth: COCO, results: Sequence[Result], image_ids: Sequence[int], task: Task, categories: Sequence[Category]
) -> dict[str, float]:
    """pycocotools' average precision by the names of `COLUMNS`, in 0..1, or -1 where there are no such objects.

    Args:
        truth: the ground truth, from `CocoDataset.ground_truth`.
        results: from `coco_results`, with `image_id`; those of other images are ignored.
        image_ids: the images to score.
        task: what to score.
        categories: the model's; only the number of their keypoints is used, and only for the task "keypoints".
    """
    fields = ("image_id", "category_id", "score", *FIELDS[task])
    scored = [{field: result[field] for field in fields} for result in results if FIELDS[task][0] in result]
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, _load_results(truth, scored), task)
        evaluation.params.imgIds = list(image_ids)
        if task == "keypoints":
            (points,) = {len(category.keypoints) for category in categories if category.keypoints}
            sigmas = evaluation.params.kpt_oks_sigmas
            if points != len(sigmas):  # COCO measured those of its 17 keypoints only; others get their mean
                evaluation.params.kpt_oks_sigmas = np.full(points, sigmas.mean())
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    columns = [column for column in COLUMNS if task != "keypoints" or column != "AP_S"]
    return dict(zip(columns, evaluation.stats.tolist(), strict=False))  # average recall follows


def table(metrics: Metrics) -> str:
    """Format average precision in per cent, one line for each task; "-" where there is none."""
    lines = ["".join(f"{name:>10}" for name in ("", *COLUMNS))]
    for task, values in metrics.items():
        cells = (f"{100 * values[name]:.1f}" if values.get(name, -1) >= 0 else "-" for name in COLUMNS)
        lines.append("".join(f"{cell:>10}" for cell in (task, *cells)))
    return "\n".join(lines)


def _load_results(truth: COCO, results: list[Result]) -> COCO:
    if results:
        return truth.loadRes(cast(Any, results))  # annotated as if it took file names only
    empty = COCO()  # loadRes fails on an empty list
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _tasks(config: ModelConfig) -> list[Task]:
    branches: dict[Task, object] = {"bbox": config.box, "segm": config.mask, "keypoints": config.keypoint}
    return [task for task, branch in branches.items() if branch is not None]


def _write_json(path: Path, content: object) -> None:
    with path.open("w") as file:
        json.dump(content, file)
