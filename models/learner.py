"""One step of training: the losses of some mini-batches, their mean gradient, and an update of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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

    def step(self, batches: Sequence[Batch], lr: float, iteration: int) -> list[dict[str, float]]:
        """Update the weights by the mean gradient of several mini-batches.

        Args:
            batches: at least one.
            lr: the learning rate.
            iteration: the index of this step, for errors.

        Returns:
            The losses of each mini-batch, by name.

        Raises:
            NonFiniteLossError: a loss or the gradient is not finite. The weights are not changed.
        """
        losses = [self._backward(batch, len(batches), iteration) for batch in batches]
        # With several processes, the gradient is already their mean: if it is not finite, all of them stop.
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.solver.clip_norm or math.inf)
        check_finite(losses[-1] | {"gradient": norm.item()}, iteration, batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def _backward(self, batch: Batch, num_batches: int, iteration: int) -> dict[str, float]:
        """Add a mini-batch's gradient, divided by the number of mini-batches, and return the mini-batch's losses."""
        amp = self.solver.amp and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
            losses = self.stage.select_losses(self.network(*to_device(batch, self.input, self.device)))
        values = torch.stack(list(losses.values()))
        (values.sum() / num_batches).backward()
        named = dict(zip(losses, values.tolist(), strict=True))
        check_finite(named, iteration, [batch])
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


def check_finite(values: Mapping[str, float], iteration: int, batches: Sequence[Batch]) -> None:
    """Check that losses and the norm of the gradient are finite.

    Args:
        values: by name.
        iteration: the index of the step, from 0.
        batches: the mini-batches that gave the values.

    Raises:
        NonFiniteLossError: a value is NaN or infinite. The error names the images and all values.
    """
    if not all(map(math.isfinite, values.values())):
        image_ids = [target.image_id for batch in batches for target in batch.targets]
        raise NonFiniteLossError(
            f"iteration {iteration}: expected finite values, got {values} of images {image_ids}; the weights were not"
            " updated, and the last checkpoint is intact"
        )
