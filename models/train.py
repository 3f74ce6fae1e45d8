"""Train a Mask R-CNN.

    python -m models.train R-50-FPN --data.root COCO --output runs/x
    torchrun --nproc-per-node 8 -m models.train R-50-FPN --data.root COCO --output runs/x

The numbers of `models.config.TrainConfig` are options; `python -m models.train R-50-FPN --help` lists them with the
preset's values. Without `--data.root`, shapes are generated and learnt.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import torch
import tyro
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import get_model_weights

from models import distributed
from models import preprocess as pictures
from models.config import InputConfig, ModelConfig, SolverConfig, TrainConfig
from models.data.coco import CocoDataset
from models.data.loader import Batch, train_loader
from models.evaluate import evaluate, open_dataset
from models.network.mask_rcnn import MaskRCNN
from models.presets import PRESETS
from models.train_log import TrainLog
from models.weights import checkpoint

LAST = "last.pth"  # with the state of training: what --resume continues from
FINAL = "model.pth"
BATCH = 16  # images, for which `SolverConfig.lr` is given (§3.1)
IMAGENET = {
    (18, 1, 64): "resnet18",
    (34, 1, 64): "resnet34",
    (50, 1, 64): "resnet50",
    (101, 1, 64): "resnet101",
    (101, 64, 4): "resnext101_64x4d",
    (101, 32, 8): "resnext101_32x8d",
}


class NonFiniteLossError(RuntimeError):
    """A loss, or the gradient's norm, of NaN or infinity. The weights are those of the last step."""


def train(config: TrainConfig) -> None:
    """Train, in this process or in all that `torchrun` has started, and write `model.pth` into `config.output`."""
    solver, rank, world = config.solver, distributed.rank(), distributed.world()
    last = config.output / LAST
    if last.exists() and not config.resume:
        raise FileExistsError(f"output: expected a new folder, or --resume to go on with {last}, which exists")

    dataset = open_dataset(config.data, config.model, config.on_error, training=True)
    held_out = open_dataset(config.data, config.model, config.on_error)
    config = replace(config, model=fitted(config.model, dataset))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(solver.seed)
    model = MaskRCNN(config.model)
    # What the order of the images depends on.
    order = {
        "seed": solver.seed,
        "processes": world,
        "images_per_gpu": solver.images_per_gpu,
        "accumulate": solver.accumulate,
    }
    if config.resume:
        state = resume(model, last, order)
    else:
        start_from(model, config.weights)
        state = {"iteration": 0, "optimizer": None}
    model.to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, solver.lr, solver.momentum, weight_decay=solver.weight_decay)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    network = DistributedDataParallel(model) if world > 1 else model

    images_per_step = solver.images_per_gpu * world * solver.accumulate
    lr = solver.lr * images_per_step / BATCH
    distributed.say(
        f"learning rate {solver.lr} for {BATCH} images: {lr:g} for {images_per_step}, on {world} x {device.type}"
    )
    batches = iter(
        train_loader(
            dataset,
            config.data,
            solver.images_per_gpu,
            max_size=config.model.input.max_size,
            seed=solver.seed,
            start=state["iteration"] * solver.accumulate,
            rank=rank,
            world=world,
        )
    )
    with TrainLog(config, state["iteration"]) as log:
        for iteration in range(state["iteration"], solver.iterations):
            # A seed for each iteration: a checkpoint need not know what was drawn before.
            torch.manual_seed((solver.seed * solver.iterations + iteration) * world + rank)
            rate = lr * schedule(solver, iteration)
            for group in optimizer.param_groups:
                group["lr"] = rate

            for _ in range(solver.accumulate):
                batch = next(batches)
                with torch.autocast(device.type, torch.bfloat16, enabled=solver.amp and device.type == "cuda"):
                    losses = network(*on_device(batch, config.model.input, device))
                (sum(losses.values()) / solver.accumulate).backward()
                values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
                image_ids = [target.image_id for target in batch.targets]
                check_finite(values, iteration, image_ids)
                log.add(values, len(batch.images) * world)

            # Of all processes together: where one has met a loss that is not finite, none goes on.
            norm = torch.nn.utils.clip_grad_norm_(parameters, solver.clip_norm or math.inf)
            check_finite(values | {"gradient": norm.item()}, iteration, image_ids)
            optimizer.step()
            optimizer.zero_grad()

            done = iteration + 1
            log.step(done, rate)
            if done % solver.evaluate_every == 0 or done == solver.iterations:
                distributed.broadcast_buffers(model)  # each process has its own statistics of batch norm
                model.eval()
                metrics = evaluate(model, dataset.categories, held_out, config.data, config.output, amp=solver.amp)
                model.train()
                log.metrics(done, metrics)
            # After the evaluation: a run that is killed during it evaluates when it is resumed.
            if rank == 0 and (done % solver.checkpoint_every == 0 or done == solver.iterations):
                state = {"iteration": done, "optimizer": optimizer.state_dict(), "order": order}
                checkpoint.save(last, model, dataset.categories, **state)

    if rank == 0:
        checkpoint.save(config.output / FINAL, model, dataset.categories)
    for problems in distributed.gather(dataset.problems):
        dataset.problems.merge(problems)
    distributed.say(f"{dataset.summary()}\n{held_out.summary()}\n{config.output / FINAL}")


def fitted(config: ModelConfig, dataset: CocoDataset) -> ModelConfig:
    """The model for a data set's classes and keypoints."""
    config = replace(config, classes=len(dataset.categories))
    if config.keypoint is None:
        return config
    return replace(config, keypoint=replace(config.keypoint, keypoints=len(dataset.keypoint_names)))


def start_from(model: MaskRCNN, weights: str | None) -> None:
    """Load what training starts from, and say what of the model it leaves as it was drawn.

    Args:
        model: freshly made.
        weights: "imagenet": torchvision's weights of the backbone, which it fetches once; a file; or None.

    Raises:
        ValueError: the file does not fit, or there is none and normalisation depends on one.
    """
    backbone = model.config.backbone
    if weights is None:
        if backbone.norm == "frozen" or backbone.frozen_stages:
            raise ValueError(
                "weights: expected 'imagenet' or a file, got None, which needs --model.backbone.norm batch"
                " --model.backbone.frozen-stages 0: what is frozen has to come from somewhere"
            )
        return
    path = Path(weights)
    if weights == "imagenet":
        published = get_model_weights(IMAGENET[backbone.depth, backbone.groups, backbone.width_per_group])
        path = Path(torch.hub.get_dir(), "checkpoints", Path(published.IMAGENET1K_V1.url).name)
        try:
            if distributed.rank() == 0 and not path.exists():
                published.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except URLError as error:
            raise ValueError(
                f"weights: expected {published.IMAGENET1K_V1.url} or --weights FILE, got {error}"
            ) from error
        distributed.barrier()
    differences = checkpoint.load_weights(model, path)
    distributed.say(f"weights: {path}\n{differences}")


def resume(model: MaskRCNN, path: Path, order: dict[str, int]) -> dict:
    """Load a run's last checkpoint; returns its iteration and the optimiser's state.

    Raises:
        ValueError: there is none, or it is of another model or another order of images.
    """
    if not path.exists():
        raise ValueError(f"resume: expected {path}, which is not there")
    state = checkpoint.load_training(model, path)
    if state["order"] != order:
        raise ValueError(f"resume: expected {state['order']} as before, got {order}")
    return state


def schedule(solver: SolverConfig, iteration: int) -> float:
    """What the learning rate is multiplied with: linear growth at first, and gamma once more after each step."""
    grown = min(iteration / solver.warmup, 1.0) if solver.warmup else 1.0
    factor = solver.warmup_factor + (1 - solver.warmup_factor) * grown
    return factor * solver.gamma ** sum(iteration >= step for step in solver.steps)


def on_device(batch: Batch, config: InputConfig, device: torch.device) -> tuple[Tensor, Tensor, list]:
    """Images, their sizes, and targets, as the model takes them."""
    images = [image.to(device, non_blocking=True) for image in batch.images]
    return *pictures.batch(images, config), [target.to(device, non_blocking=True) for target in batch.targets]


def check_finite(values: dict[str, float], iteration: int, image_ids: list[int]) -> None:
    if not all(map(math.isfinite, values.values())):
        raise NonFiniteLossError(
            f"iteration {iteration}: {values} of images {image_ids}; the weights were not touched, and the last"
            " checkpoint is good"
        )


def main() -> None:
    presets = {name: ("", preset) for name, preset in PRESETS.items()}
    config = tyro.extras.overridable_config_cli(presets, config=(tyro.conf.AvoidSubcommands,))
    if config.solver.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    with distributed.process_group():
        train(config)


if __name__ == "__main__":
    main()
