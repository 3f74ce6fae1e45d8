"""COCO's average precision of a checkpoint: `python -m models.evaluate --checkpoint FILE --data.root DIR`.

Under `torchrun`, the processes share the images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from models.coco_eval import evaluate, table
from models.config import DataConfig
from models.data.datasets import open_dataset
from models.distributed import process_group, say
from models.weights.checkpoint import load_model


@dataclass(frozen=True)
class EvaluateConfig:
    """Average precision of a checkpoint on `data.val`."""

    checkpoint: Path
    data: DataConfig = field(default_factory=DataConfig)
    output: Path = Path("runs/evaluate")  # for detections.json and metrics.json
    on_error: Literal["raise", "skip"] = "raise"  # stop at a bad image or annotation, or leave it out and count it
    amp: bool = True  # bfloat16 on CUDA


def main(config: EvaluateConfig) -> None:
    """Evaluate a checkpoint, write the results to `config.output` and print a table of the average precision."""
    with process_group():
        model, categories = load_model(config.checkpoint)
        dataset = open_dataset(config.data, model.config, config.on_error)
        metrics = evaluate(model, categories, dataset, config.data, config.output, amp=config.amp)
        say(f"{dataset.summary()}\n\n{table(metrics)}\n\n{config.output}/detections.json, metrics.json")


if __name__ == "__main__":
    main(tyro.cli(EvaluateConfig))
