"""One step of training: the losses of some mini-batches, their mean gradient, and an update of the weights.

A step does not synchronise with the device. Its losses stay there until `Learner.read` copies those of many steps at
once. Whether they are finite is decided on the device: once a loss or the gradient is not, the weights stay as they
are, and the next `read` raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from models import distributed, preprocess
from models.config import InputConfig, TrainConfig
from models.data.loader import Batch
from models.marks import mark
from models.network.mask_rcnn import MaskRCNN
from models.stages import Stage
from models.structures import PaddedTargets

GRADIENT = "gradient"  # the name of the gradient's norm in errors


class NonFiniteLossError(RuntimeError):
    """A loss or the norm of the gradient is NaN or infinite. The weights are those before that iteration."""


class _Unread(NamedTuple):
    """The values of a mini-batch on the device."""

    iteration: int
    image_ids: list[int]
    names: tuple[str, ...]
    values: Tensor  # [names]


class _SGD(torch.optim.SGD):
    """The fused optimiser changes nothing where `found_inf` is 1, which a gradient scaler would set."""

    found_inf: Tensor


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
        self.optimizer = _SGD(self.parameters, solver.lr, solver.momentum, weight_decay=solver.weight_decay, fused=True)
        self.optimizer.found_inf = self._failed = torch.zeros((), device=self.device)  # stays 1 once it is
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.network = _distribute(model) if distributed.world() > 1 else model
        self._unread: list[_Unread] = []

    def step(self, batches: Iterator[Batch], lr: float, iteration: int) -> None:
        """Update the weights by the mean gradient of `solver.accumulate` mini-batches.

        Args:
            batches: where to take them from, each after the gradient of the one before.
            lr: the learning rate.
            iteration: the index of this step, for errors.
        """
        image_ids: list[int] = []
        for index, batch in enumerate(islice(batches, self.solver.accumulate), start=1):
            with self._without_reduction() if index < self.solver.accumulate else nullcontext():
                self._backward(batch, iteration)
            image_ids += list(batch.targets.image_ids)
        with mark("optimizer"):
            self._update(lr, iteration, image_ids)

    def _update(self, lr: float, iteration: int, image_ids: list[int]) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # With several processes, the gradient is already their mean: if it is not finite, all of them stop.
        norm = get_total_norm(gradients)
        if self.solver.clip_norm is not None:
            clip_grads_with_norm_(self.parameters, self.solver.clip_norm, norm)
        self._record(iteration, image_ids, {GRADIENT: norm})
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def read(self) -> list[dict[str, float]]:
        """The losses of each mini-batch since the last call, by name. Synchronises with the device once.

        Raises:
            NonFiniteLossError: a loss or the gradient of one of these iterations is not finite. The weights are those
                before this iteration.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return []
        values = torch.cat([entry.values for entry in unread]).tolist()
        losses = []
        for entry in unread:
            named = dict(zip(entry.names, values, strict=False))
            values = values[len(named) :]
            if GRADIENT in named:
                check_finite(losses[-1] | named, entry)
            else:
                check_finite(named, entry)
                losses.append(named)
        return losses

    def _backward(self, batch: Batch, iteration: int) -> None:
        """Add a mini-batch's gradient, divided by the number of mini-batches."""
        amp = self.solver.amp and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
            losses = self.stage.select_losses(self.network(*self._inputs(batch)))
        total = self._record(iteration, list(batch.targets.image_ids), losses)
        with mark("backward"):
            (total / self.solver.accumulate).backward()

    def _record(self, iteration: int, image_ids: list[int], named: Mapping[str, Tensor]) -> Tensor:
        """Keep values for `read`, and stop updates if one is not finite. Returns their sum."""
        values = torch.stack(list(named.values()))
        total = values.sum()
        self._failed.logical_or_(~values.detach().isfinite().all())
        self._unread.append(_Unread(iteration, image_ids, tuple(named), values.detach()))
        return total

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, PaddedTargets]:
        """The arguments of the network. On CUDA they are copied while the device works on earlier steps."""
        if self.copies is None:
            return to_device(batch, self.input, self.device)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.copies):
            images, sizes, targets = to_device(batch, self.input, self.device)
        current.wait_stream(self.copies)
        for tensor in (images, sizes, *targets.tensors()):
            tensor.record_stream(current)
        return images, sizes, targets

    def _without_reduction(self) -> AbstractContextManager[None]:
        """Processes exchange the gradient of a step's last mini-batch only, which contains those before."""
        return self.network.no_sync() if isinstance(self.network, DistributedDataParallel) else nullcontext()


def _distribute(model: MaskRCNN) -> DistributedDataParallel:
    """Average gradients over the processes. Constant statistics need not be broadcast in each step."""
    learns_statistics = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=learns_statistics)


def to_device(batch: Batch, config: InputConfig, device: torch.device) -> tuple[Tensor, Tensor, PaddedTargets]:
    """Move a mini-batch to a device, and normalise and pad the images there.

    Args:
        batch: from `training_batches`.
        config: of the model's input.
        device: of the model.

    Returns:
        The arguments of `MaskRCNN.forward`: padded images, their sizes before padding, and targets.
    """
    images, sizes = preprocess.batch([image.to(device, non_blocking=True) for image in batch.images], config)
    return images, sizes, batch.targets.to(device, non_blocking=True)


def check_finite(values: Mapping[str, float], entry: _Unread) -> None:
    """Check that losses, or the norm of the gradient, are finite.

    Args:
        values: by name.
        entry: whose values they are.

    Raises:
        NonFiniteLossError: a value is NaN or infinite. The error names the iteration, the images and all values.
    """
    if not all(map(math.isfinite, values.values())):
        raise NonFiniteLossError(
            f"iteration {entry.iteration}: expected finite values, got {values} of images {entry.image_ids};"
            " the weights are those before this iteration, and the last checkpoint is intact"
        )
