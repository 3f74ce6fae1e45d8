"""One step of training: the losses of some mini-batches, their mean gradient, and an update of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models import distributed, preprocess
from models.config import InputConfig, TrainConfig
from models.data.loader import Batch
from models.network.mask_rcnn import MaskRCNN
from models.stages import Stage
from models.structures import Target


class NonFiniteLossError(RuntimeError):
    """A loss or the norm of the gradient is NaN or infinite. The weights are those after the last step."""


class Learner:
    """The optimiser of one stage, and its step."""

    def __init__(
        self, model: MaskRCNN, stage: Stage, learnable: Mapping[str, nn.Parameter], config: TrainConfig
    ) -> None:
        """Create the optimiser of the stage's trainable parameters.

        Args:
            model: in training mode, on the device to train on. The stage enables and disables gradients in it.
            stage: what to train.
            learnable: the parameters that the model's config does not freeze, by name.
            config: of the run.
        """
        solver = config.solver
        self.stage = stage
        self.solver = solver
        self.input = config.model.input
        self.parameters = stage.set_trainable(learnable)
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.SGD(self.parameters, solver.lr, solver.momentum, weight_decay=solver.weight_decay)
        self.network = DistributedDataParallel(model) if distributed.world() > 1 else model

    def step(self, batches: Iterator[Batch], lr: float, iteration: int) -> list[dict[str, float]]:
        """Update the weights by the mean gradient of `solver.accumulate` mini-batches.

        Args:
            batches: where to take them from, each after the gradient of the one before.
            lr: the learning rate.
            iteration: the index of this step, for errors.

        Returns:
            The losses of each mini-batch, by name.

        Raises:
            NonFiniteLossError: a loss or the gradient is not finite. The weights are not changed.
        """
        losses, image_ids = [], []
        for batch in islice(batches, self.solver.accumulate):
            losses.append(self._backward(batch, iteration))
            image_ids += image_ids_of(batch)
        # With several processes, the gradient is already their mean: if it is not finite, all of them stop.
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.solver.clip_norm or math.inf)
        check_finite(losses[-1] | {"gradient": norm.item()}, iteration, image_ids)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def _backward(self, batch: Batch, iteration: int) -> dict[str, float]:
        """Add a mini-batch's gradient, divided by the number of mini-batches, and return the mini-batch's losses."""
        amp = self.solver.amp and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
            losses = self.stage.select_losses(self.network(*to_device(batch, self.input, self.device)))
        values = torch.stack(list(losses.values()))
        (values.sum() / self.solver.accumulate).backward()
        named = dict(zip(losses, values.tolist(), strict=True))
        check_finite(named, iteration, image_ids_of(batch))
        return named


def to_device(batch: Batch, config: InputConfig, device: torch.device) -> tuple[Tensor, Tensor, list[Target]]:
    """Move a mini-batch to a device, and normalise and pad the images there.

    Args:
        batch: from `training_batches`.
        config: of the model's input.
        device: of the model.

    Returns:
        The arguments of `MaskRCNN.forward`: padded images, their sizes before padding, and targets.
    """
    images, sizes = preprocess.batch([image.to(device, non_blocking=True) for image in batch.images], config)
    return images, sizes, [target.to(device, non_blocking=True) for target in batch.targets]


def image_ids_of(batch: Batch) -> list[int]:
    """The ids of a mini-batch's images."""
    return [target.image_id for target in batch.targets]


def check_finite(values: Mapping[str, float], iteration: int, image_ids: Sequence[int]) -> None:
    """Check that losses and the norm of the gradient are finite.

    Args:
        values: by name.
        iteration: the index of the step, from 0.
        image_ids: of the images that gave the values.

    Raises:
        NonFiniteLossError: a value is NaN or infinite. The error names the images and all values.
    """
    if not all(map(math.isfinite, values.values())):
        raise NonFiniteLossError(
            f"iteration {iteration}: expected finite values, got {values} of images {list(image_ids)};"
            " the weights were not updated, and the last checkpoint is intact"
        )
