"""Opening a data set, adapting a model to it, and checking that a model fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from models.config import DataConfig, ModelConfig
from models.data.coco import CocoDataset
from models.data.synthetic.shapes import ShapesConfig, ensure
from models.distributed import barrier, rank
from models.structures import Category

SHAPES = Path("runs/shapes")  # the generated data set, which is used if no other is given


def open_dataset(
    data: DataConfig, model: ModelConfig, on_error: Literal["raise", "skip"], *, training: bool = False
) -> CocoDataset:
    """Open one split of a data set. Without `data.root`, shapes are generated into `runs/shapes` and opened.

    Args:
        data: where the data set is.
        model: targets have masks and keypoints if the model has branches for them.
        on_error: "raise" stops at bad data; "skip" leaves it out and counts it.
        training: whether to open `data.train`, without images that have nothing to learn from, instead of `data.val`.

    Raises:
        DataError: the annotations are missing or malformed, as for `CocoDataset`.
    """
    root = data.root
    if root is None:
        root = SHAPES
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


def adapt_to_dataset(config: ModelConfig, dataset: CocoDataset) -> ModelConfig:
    """Set the numbers of classes and keypoints of a model to those of a data set.

    Args:
        config: of the model.
        dataset: opened with keypoints if the model has a keypoint branch.

    Returns:
        A changed copy of `config`.
    """
    config = replace(config, classes=len(dataset.categories))
    if config.keypoint is None:
        return config
    return replace(config, keypoint=replace(config.keypoint, keypoints=len(dataset.keypoint_names)))


def check_model_categories(categories: Sequence[Category], dataset: CocoDataset) -> None:
    """Check that a model has every category of a data set with the same id, name and keypoints.

    Args:
        categories: the model's; it may have more than the data set.
        dataset: the data set to evaluate on.

    Raises:
        ValueError: a category or a list of keypoints is missing or differs.
    """
    names = {category.id: category.name for category in categories}
    expected = {category.id: category.name for category in dataset.categories}
    if expected.items() - names.items():
        raise ValueError(f"categories: expected the data set's {expected}, got the model's {names}")
    points = {category.keypoints for category in categories if category.keypoints}
    if dataset.keypoint_names and points != {dataset.keypoint_names}:
        raise ValueError(
            f"categories: expected the data set's keypoints {dataset.keypoint_names}, got {points or None}"
        )
