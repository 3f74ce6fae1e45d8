"""COCO's average precision: `python -m models.evaluate --checkpoint FILE --data.root DIR`.

Detections go into results as they are made: boxes, scores and run-length encoded masks, which is all that grows with
the number of images. The processes of a `torchrun` share the images; the first one merges and scores.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
import tyro
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from models.config import DataConfig, ModelConfig
from models.data.coco import PIXEL_CENTRE, CocoDataset
from models.data.loader import BadSample, eval_loader
from models.data.synthetic.shapes import ShapesConfig, ensure
from models.distributed import barrier, broadcast, gather, process_group, rank, say, world
from models.rle import encode_masks
from models.structures import Category, Detections
from models.weights.checkpoint import load_model

Task = Literal["bbox", "segm", "keypoints"]
Metrics = dict[Task, dict[str, float]]
Result = dict[str, Any]  # a detection in COCO's submission format

COLUMNS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")

# Of a result, what each task reads: pycocotools would take the area of a mask from its box, were it there.
FIELDS: dict[Task, tuple[str, ...]] = {
    "bbox": ("bbox",),
    "segm": ("segmentation",),
    "keypoints": ("keypoints", "bbox"),
}


class Detector(Protocol):
    """What evaluation asks of a model."""

    @property
    def config(self) -> ModelConfig: ...

    def detect(self, images: Sequence[Tensor]) -> list[Detections]: ...


@dataclass(frozen=True)
class EvaluateConfig:
    """Average precision of a checkpoint on `data.val`."""

    checkpoint: Path
    data: DataConfig = field(default_factory=DataConfig)
    output: Path = Path("runs/evaluate")  # detections.json and metrics.json
    on_error: Literal["raise", "skip"] = "raise"  # a bad image or annotation stops, or is counted and left out
    amp: bool = True  # bfloat16 on CUDA


def evaluate(
    model: Detector,
    categories: Sequence[Category],
    dataset: CocoDataset,
    data: DataConfig,
    output: Path | None = None,
    *,
    amp: bool = True,
) -> Metrics:
    """Detects in every image of `dataset`, whose share falls to this process, and scores what all have found.

    Args:
        model: in evaluation mode.
        categories: the model's: label k is `categories[k - 1]`. They meet the data set's by their ids.
        dataset: images and ground truth.
        data: how to read it.
        output: folder for detections.json, in COCO's submission format, and metrics.json.
        amp: bfloat16 on CUDA.

    Returns:
        In every process, for each task the model has a branch for: AP, AP50, AP75, AP_S, AP_M, AP_L (no AP_S of
        keypoints), 0..1, or -1 where nothing is there to be found.
    """
    check_categories(categories, dataset)
    results: list[Result] = []
    seen: list[int] = []
    loader = eval_loader(dataset, data, rank=rank(), world=world())
    for sample in tqdm(loader, desc="evaluate", unit="image", disable=rank() > 0):
        if isinstance(sample, BadSample):
            continue  # counted in dataset.problems
        image, image_id = sample
        with torch.autocast("cuda", torch.bfloat16, enabled=amp and torch.cuda.is_available()):
            (detections,) = model.detect([image])
        results += [{"image_id": image_id, **found} for found in coco_results(detections, categories)]
        seen.append(image_id)

    metrics: Metrics = {}
    if shares := gather((results, seen, dataset.problems)):  # the first rank
        results = sorted((entry for share in shares for entry in share[0]), key=lambda entry: entry["image_id"])
        seen = sorted(image_id for share in shares for image_id in share[1])
        for share in shares[1:]:
            dataset.problems.merge(share[2])
        truth = dataset.ground_truth()
        metrics = {task: average_precision(truth, results, seen, task, categories) for task in _tasks(model.config)}
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            _write(output / "detections.json", results)
            _write(output / "metrics.json", {"images": len(seen), "skipped": len(dataset) - len(seen), **metrics})
    return broadcast(metrics)


def check_categories(categories: Sequence[Category], dataset: CocoDataset) -> None:
    """Raises a ValueError unless the model knows what the data set asks for, by the same ids, names and keypoints."""
    names, expected = ({category.id: category.name for category in some} for some in (categories, dataset.categories))
    if expected.items() - names.items():
        raise ValueError(f"categories: expected the data set's {expected}, got the model's {names}")
    points = {category.keypoints for category in categories if category.keypoints}
    if dataset.keypoint_names and points != {dataset.keypoint_names}:
        raise ValueError(
            f"categories: expected the data set's keypoints {dataset.keypoint_names}, got {points or None}"
        )


def coco_results(detections: Detections, categories: Sequence[Category]) -> list[Result]:
    """One image's detections in COCO's submission format, but for the image_id; best first."""
    found = [categories[label - 1] for label in detections.labels.tolist()]
    boxes = box_convert(detections.boxes, "xyxy", "xywh").tolist()
    results: list[Result] = [
        {"category_id": category.id, "bbox": box, "score": score}
        for category, box, score in zip(found, boxes, detections.scores.tolist(), strict=True)
    ]
    if detections.mask_probabilities is not None:
        for result, rle in zip(results, encode_masks(detections), strict=True):
            result["segmentation"] = rle
    if detections.keypoints is not None:
        indices = detections.keypoints - detections.keypoints.new_tensor([PIXEL_CENTRE, PIXEL_CENTRE, 0])
        for result, category, points in zip(results, found, indices.flatten(1).tolist(), strict=True):
            if category.keypoints:
                result["keypoints"] = points
    return results


def average_precision(
    truth: COCO, results: Sequence[Result], image_ids: Sequence[int], task: Task, categories: Sequence[Category]
) -> dict[str, float]:
    """pycocotools' summary of some images' results, by the names of `COLUMNS`.

    Args:
        truth: the data set.
        results: with `image_id`, of any images.
        image_ids: of the images that count.
        task: what is scored.
        categories: the keypoints of each, for that task.
    """
    fields = ("image_id", "category_id", "score", *FIELDS[task])
    found = [{field: result[field] for field in fields} for result in results if FIELDS[task][0] in result]
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, _load_results(truth, found), task)
        evaluation.params.imgIds = list(image_ids)
        if task == "keypoints":
            (points,) = {len(category.keypoints) for category in categories if category.keypoints}
            sigmas = evaluation.params.kpt_oks_sigmas
            if points != len(sigmas):  # COCO has measured its own 17 only: others get their mean
                evaluation.params.kpt_oks_sigmas = np.full(points, sigmas.mean())
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    columns = [column for column in COLUMNS if task != "keypoints" or column != "AP_S"]
    return dict(zip(columns, evaluation.stats.tolist(), strict=False))  # average recall follows


def _load_results(truth: COCO, found: list[Result]) -> COCO:
    if found:
        return truth.loadRes(cast(Any, found))  # its annotation knows the names of files only
    nothing = COCO()  # loadRes looks at the first result
    nothing.dataset = {**truth.dataset, "annotations": []}
    nothing.createIndex()
    return nothing


def _tasks(config: ModelConfig) -> list[Task]:
    branches: dict[Task, object] = {"bbox": config.box, "segm": config.mask, "keypoints": config.keypoint}
    return [task for task, branch in branches.items() if branch is not None]


def _write(path: Path, content: object) -> None:
    with path.open("w") as file:
        json.dump(content, file)


def table(metrics: Metrics) -> str:
    """Average precision in per cent, a line for each task."""
    lines = ["".join(f"{name:>10}" for name in ("", *COLUMNS))]
    for task, values in metrics.items():
        cells = (f"{100 * values[name]:.1f}" if values.get(name, -1) >= 0 else "-" for name in COLUMNS)
        lines.append("".join(f"{cell:>10}" for cell in (task, *cells)))
    return "\n".join(lines)


def open_dataset(
    data: DataConfig, model: ModelConfig, on_error: Literal["raise", "skip"], *, training: bool = False
) -> CocoDataset:
    """`data.val`, or `data.train`, with what the model's branches ask for; generated shapes if there is no root."""
    root = data.root
    if root is None:
        root = Path("runs/shapes")
        if rank() == 0:
            ensure(ShapesConfig(root))
        barrier()
    return CocoDataset(
        root,
        data.train if training else data.val,
        data.annotations,
        training=training,
        masks=model.mask is not None,
        keypoints=model.keypoint is not None,
        on_error=on_error,
    )


def main(config: EvaluateConfig) -> None:
    with process_group():
        model, categories = load_model(config.checkpoint)
        dataset = open_dataset(config.data, model.config, config.on_error)
        metrics = evaluate(model, categories, dataset, config.data, config.output, amp=config.amp)
        say(f"{dataset.summary()}\n\n{table(metrics)}\n\n{config.output}/detections.json, metrics.json")


if __name__ == "__main__":
    main(tyro.cli(EvaluateConfig))
