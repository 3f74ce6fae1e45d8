"""Train a Mask R-CNN.

    python -m models.train R-50-FPN --data.root COCO --output runs/x
    torchrun --nproc-per-node 8 -m models.train R-50-FPN --data.root COCO --output runs/x

Every field of `models.config.TrainConfig` is an option; `python -m models.train R-50-FPN --help` lists them with the
values of the preset. Without `--data.root`, a data set of shapes is generated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from models import distributed
from models.coco_eval import Metrics, evaluate
from models.config import SolverConfig, TrainConfig
from models.data.coco import CocoDataset
from models.data.datasets import adapt_to_dataset, open_dataset
from models.data.loader import Batch, train_loader
from models.learner import Learner
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS
from models.stages import end_to_end, total_iterations
from models.structures import Category
from models.train_log import TrainLog
from models.weights import checkpoint
from models.weights.torchvision import download_backbone

LAST = "last.pth"  # the weights and the state of training, for --resume
FINAL = "model.pth"
REFERENCE_BATCH = 16  # the number of images in a step that `SolverConfig.lr` is for (§3.1)


def train(config: TrainConfig) -> None:
    """Train in this process, or in all processes of a `torchrun`, and write `model.pth` into `config.output`.

    Args:
        config: of the run. Its numbers of classes and keypoints are replaced by those of the data set.

    Raises:
        FileExistsError: the output folder has a checkpoint and `config.resume` is not set.
        DataError: bad data, unless `config.on_error` is "skip".
        NonFiniteLossError: a loss or the gradient is not finite.
        ValueError: the weights or the checkpoint do not fit the model or this run.
    """
    solver, last = config.solver, config.output / LAST
    if last.exists() and not config.resume:
        raise FileExistsError(f"output: expected a new folder, or --resume to continue, got one with {last}")
    dataset = open_dataset(config.data, config.model, config.on_error, training=True)
    held_out = open_dataset(config.data, config.model, config.on_error)
    config = replace(config, model=adapt_to_dataset(config.model, dataset))

    torch.manual_seed(solver.seed)
    model = MaskRCNN(config.model)
    if config.resume:
        progress = resume(model, last, image_order(solver))
    else:
        start_from(model, config.weights)
        progress = Progress()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    learnable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    stages = end_to_end(solver)
    total = total_iterations(stages)
    done = total_iterations(stages[: progress.stage]) + progress.iteration
    lr = scaled_learning_rate(solver, device)
    batches = training_batches(dataset, config, done)
    with TrainLog(config, total, done) as log:
        for stage in stages[progress.stage :]:
            learner = Learner(model, stage, learnable, config)
            if progress.optimizer is not None:
                learner.optimizer.load_state_dict(progress.optimizer)
            for iteration in range(progress.iteration, stage.schedule.iterations):
                seed_iteration(solver.seed, done, total)
                rate = lr * stage.schedule.factor(iteration)
                learner.step(batches, rate, done)
                done += 1
                evaluates, saves = (
                    done % every == 0 or done == total for every in (solver.evaluate_every, solver.checkpoint_every)
                )
                if done % solver.log_every == 0 or evaluates or saves:  # raises if the weights are no longer updated
                    for losses in learner.read():
                        log.add(losses)
                log.step(done, rate)
                if evaluates:
                    log.metrics(done, evaluate_held_out(model, dataset.categories, held_out, config))
                if saves:  # after the evaluation: a run that is killed during an evaluation repeats it when resumed
                    state = Progress(progress.stage, iteration + 1, learner.optimizer.state_dict())
                    save(last, model, dataset.categories, order=image_order(solver), **vars(state))
            progress = Progress(progress.stage + 1)

    save(config.output / FINAL, model, dataset.categories)
    for problems in distributed.gather(dataset.problems):
        dataset.problems.merge(problems)
    distributed.say(f"{dataset.summary()}\n{held_out.summary()}\n{config.output / FINAL}")


@dataclass(frozen=True)
class Progress:
    """The progress of a run; a checkpoint holds these fields."""

    stage: int = 0  # index in the list of stages
    iteration: int = 0  # number of iterations of this stage that are done
    optimizer: dict[str, Any] | None = None  # its state dict; None at the start of a stage


def start_from(model: MaskRCNN, weights: str | None) -> None:
    """Load the weights that training starts from, and print which parts of the model keep their random initialisation.

    Args:
        model: newly constructed.
        weights: "imagenet" for torchvision's weights of the backbone, which are downloaded once; a file; or None for
            random weights.

    Raises:
        ValueError: the file does not fit the model, the download fails, or `weights` is None and the model has frozen
            layers, which would stay random.
    """
    backbone = model.config.backbone
    if weights is None:
        if backbone.norm == "frozen" or backbone.frozen_stages:
            raise ValueError(
                "weights: expected 'imagenet' or a file, got None, which needs --model.backbone.norm batch"
                " --model.backbone.frozen-stages 0: frozen layers need trained weights"
            )
        return
    path = download_backbone(backbone) if weights == "imagenet" else Path(weights)
    differences = checkpoint.load_weights(model, path)
    distributed.say(f"weights: {path}\n{differences}")


def resume(model: MaskRCNN, path: Path, order: dict[str, int]) -> Progress:
    """Load a run's last checkpoint.

    Args:
        model: its weights are replaced.
        path: of the checkpoint.
        order: from `image_order`, of this run.

    Returns:
        The progress of the run when the checkpoint was written.

    Raises:
        ValueError: there is no checkpoint, or it is of another model or of a run with another order of images.
    """
    if not path.exists():
        raise ValueError(f"resume: expected {path}, got no such file")
    state = checkpoint.load_training(model, path)
    if state["order"] != order:
        raise ValueError(f"resume: expected {state['order']} as before, got {order}")
    return Progress(state["stage"], state["iteration"], state["optimizer"])


def image_order(solver: SolverConfig) -> dict[str, int]:
    """The settings that determine the order of the images; a resumed run must have the same."""
    return {
        "seed": solver.seed,
        "processes": distributed.world(),
        "images_per_gpu": solver.images_per_gpu,
        "accumulate": solver.accumulate,
    }


def seed_iteration(seed: int, iteration: int, total: int) -> None:
    """Seed the global generator for one iteration, so that checkpoints need not store its state.

    Args:
        seed: of the run.
        iteration: over all stages, from 0.
        total: the number of iterations of all stages, so that runs with different seeds share no state.
    """
    torch.manual_seed((seed * total + iteration) * distributed.world() + distributed.rank())


def scaled_learning_rate(solver: SolverConfig, device: torch.device) -> float:
    """Scale `solver.lr` in proportion to the number of images in a step, and print it.

    Args:
        solver: learning rate, images in a step.
        device: the kind of device to print.

    Returns:
        The learning rate for `images_per_gpu * processes * accumulate` images.
    """
    world = distributed.world()
    images = solver.images_per_gpu * world * solver.accumulate
    lr = solver.lr * images / REFERENCE_BATCH
    distributed.say(
        f"learning rate {solver.lr} for {REFERENCE_BATCH} images: {lr:g} for {images}, on {world} x {device.type}"
    )
    return lr


def training_batches(dataset: CocoDataset, config: TrainConfig, iteration: int) -> Iterator[Batch]:
    """This process's mini-batches, without end.

    Args:
        dataset: opened for training.
        config: of the run.
        iteration: the first one to yield mini-batches for, from 0.
    """
    solver = config.solver
    loader = train_loader(
        dataset,
        config.data,
        solver.images_per_gpu,
        max_size=config.model.input.max_size,
        seed=solver.seed,
        start=iteration * solver.accumulate,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    return iter(loader)


def evaluate_held_out(
    model: MaskRCNN, categories: Sequence[Category], held_out: CocoDataset, config: TrainConfig
) -> Metrics:
    """Evaluate during training. All processes take over the batch-norm statistics of the first one.

    Args:
        model: in training mode, to which it returns.
        categories: of the model's labels 1, 2, ...
        held_out: the data set to evaluate on.
        config: of the run.

    Returns:
        As for `models.coco_eval.evaluate`.
    """
    distributed.broadcast_buffers(model)
    model.eval()
    metrics = evaluate(model, categories, held_out, config.data, config.output, amp=config.solver.amp)
    model.train()
    return metrics


def save(path: Path, model: MaskRCNN, categories: Sequence[Category], **training: Any) -> None:
    """Write a checkpoint in the first process; arguments as for `models.weights.checkpoint.save`."""
    if distributed.rank() == 0:
        checkpoint.save(path, model, categories, **training)


def main() -> None:
    """Train the preset that the command line names, with its options."""
    presets = {name: ("", preset) for name, preset in PRESETS.items()}
    config = tyro.extras.overridable_config_cli(presets, config=(tyro.conf.AvoidSubcommands,))
    if config.solver.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
    with distributed.process_group():
        train(config)


if __name__ == "__main__":
    main()
