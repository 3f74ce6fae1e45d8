"""The log of training: a progress bar, `log.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.coco_eval import Metrics, table
from models.config import TrainConfig, config_values
from models.distributed import rank, world


class TrainLog:
    """Losses and speed, averaged over `solver.log_every` iterations, and metrics. Only the first process writes."""

    def __init__(self, config: TrainConfig, iterations: int, start: int) -> None:
        """Open the log in `config.output`. A resumed run continues it after iteration `start`; later lines are dropped.

        Args:
            config: of the run; written to `config.json`.
            iterations: of all stages.
            start: number of iterations that are done.
        """
        self.every = config.solver.log_every
        self.images_per_batch = config.solver.images_per_gpu * world()
        self.path = config.output / "log.jsonl"
        self.quiet = rank() > 0
        self._reset()
        self.bar = tqdm(total=iterations, initial=start, desc="train", unit="it", disable=self.quiet, smoothing=0.05)
        if self.quiet:
            return
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "config.json").write_text(json.dumps(config_values(config), indent=2, default=str) + "\n")
        text = self.path.read_text() if config.resume and self.path.exists() else ""
        lines = text.rpartition("\n")[0].splitlines()  # a killed run may have left half a line
        kept = [line for line in lines if json.loads(line)["iteration"] <= start]  # later iterations are repeated
        self.path.write_text("".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(config.output), purge_step=start + 1)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if not self.quiet:
            self.board.close()

    def add(self, losses: Mapping[str, float]) -> None:
        """Add the losses of one mini-batch to the averages."""
        self.batches += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def step(self, iteration: int, lr: float) -> None:
        """Finish an iteration; every `solver.log_every` iterations, write the averages.

        Args:
            iteration: the one that is finished, counted from 1.
            lr: its learning rate.
        """
        self.bar.update()
        if iteration % self.every:
            return
        losses = {name: value / self.batches for name, value in self.sums.items()}
        speed = self.batches * self.images_per_batch / (time.perf_counter() - self.since)
        self._write(iteration, "train", {"loss": sum(losses.values()), **losses, "lr": lr, "images_per_second": speed})
        self.bar.set_postfix_str(f"loss {sum(losses.values()):.3f}, {speed:.1f} images/s")
        self._reset()

    def metrics(self, iteration: int, metrics: Metrics) -> None:
        """Write the result of an evaluation after an iteration, counted from 1."""
        for task, values in metrics.items():
            self._write(iteration, task, values)
        if not self.quiet:
            self.bar.write(f"iteration {iteration}\n{table(metrics)}")
        self._reset()  # the speed of training does not include the evaluation

    def _write(self, iteration: int, group: str, values: Mapping[str, Any]) -> None:
        if self.quiet:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, "group": group, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{group}/{name}", value, iteration)

    def _reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.batches = 0
        self.since = time.perf_counter()
