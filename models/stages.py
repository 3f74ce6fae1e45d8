"""Stages of training: which parameters each one trains, on which losses, with which learning-rate schedule.

`models.train` runs a list of stages. End-to-end training is a list of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.config import SolverConfig

ALL = ("",)  # the prefix of every name


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up of the learning rate, then a step decay. Iterations count from the start of the stage."""

    iterations: int
    steps: tuple[int, ...]  # at each of these iterations, the rate is multiplied by `gamma`
    gamma: float
    warmup: int  # iterations from `warmup_factor` to the full rate; 0 starts with the full rate
    warmup_factor: float

    def factor(self, iteration: int) -> float:
        """The factor by which the learning rate is multiplied at an iteration, counted from 0."""
        progress = min(iteration / self.warmup, 1.0) if self.warmup else 1.0
        warmup = self.warmup_factor + (1 - self.warmup_factor) * progress
        return warmup * self.gamma ** sum(iteration >= step for step in self.steps)


@dataclass(frozen=True)
class Stage:
    """One stage of training. It has an optimiser of its own."""

    name: str
    schedule: Schedule
    trainable: tuple[str, ...] = ALL  # prefixes of parameter names; what the model's config freezes stays frozen
    losses: tuple[str, ...] = ALL  # prefixes of loss names; each trainable parameter needs a gradient from one

    def set_trainable(self, parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
        """Enable gradients for the parameters of this stage and disable them for the others.

        Args:
            parameters: by name, all that the model's config does not freeze.

        Returns:
            The trainable parameters, in the given order.

        Raises:
            ValueError: a prefix in `trainable` matches no parameter.
        """
        _check_prefixes("trainable", self.trainable, list(parameters))
        for name, parameter in parameters.items():
            parameter.requires_grad_(name.startswith(self.trainable))
        return [parameter for parameter in parameters.values() if parameter.requires_grad]

    def select_losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses that this stage trains on, by name.

        Raises:
            ValueError: a prefix in `losses` matches no loss.
        """
        _check_prefixes("losses", self.losses, list(losses))
        return {name: loss for name, loss in losses.items() if name.startswith(self.losses)}


def end_to_end(solver: SolverConfig) -> tuple[Stage, ...]:
    """A single stage that trains all parameters on all losses (§3.1), with the schedule of `solver`."""
    schedule = Schedule(
        iterations=solver.iterations,
        steps=solver.steps,
        gamma=solver.gamma,
        warmup=solver.warmup,
        warmup_factor=solver.warmup_factor,
    )
    return (Stage("end-to-end", schedule),)


def total_iterations(stages: Sequence[Stage]) -> int:
    """The number of iterations of all stages together."""
    return sum(stage.schedule.iterations for stage in stages)


def _check_prefixes(argument: str, prefixes: Sequence[str], names: Sequence[str]) -> None:
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"{argument}: expected prefixes of {', '.join(names)}, got {prefix!r}")
