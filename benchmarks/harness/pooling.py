"""Shared by the benchmarks of pooling operators: inputs, the bytes that have to move, and the passes that are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
import torchvision
from torch import Tensor

from benchmarks.harness.checks import close
from benchmarks.harness.comparison import CaseOptions, Comparison
from benchmarks.harness.timing import Implementation
from benchmarks.harness.workloads import C4, DTYPES, LAYOUTS, c4_map, covered, generator

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}

Direction = Literal["forward", "backward", "forward + backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

Pool = Callable[[], Tensor]

torchvision_ops: Any = torchvision.ops  # torch.fx.wrap hides the types of its functions


@dataclass(frozen=True)
class Inputs:
    """What a pooling operator reads."""

    features: Sequence[Tensor]  # [N, C, H, W] of each level, all of one dtype
    boxes: Sequence[Tensor]  # [K, 4] of each image
    strides: Sequence[int]  # of each level

    @property
    def dtype(self) -> str:
        return str(self.features[0].dtype).removeprefix("torch.")

    def bytes(self, direction: Direction, outputs: int) -> int:
        """Bytes that have to move.

        A forward reads the pixels of the features that some box covers. A backward writes the gradient of every pixel.

        Args:
            direction: what is timed.
            outputs: bytes of the outputs, or of their gradients, and of tensors that are saved for the backward.
        """
        _, channels, _, _ = self.features[0].shape
        shapes = [(feature.shape[2], feature.shape[3]) for feature in self.features]
        read = covered(self.boxes, shapes, self.strides) * channels * self.features[0].itemsize
        written = sum(feature.nbytes for feature in self.features)
        per_pass = outputs + sum(box.nbytes for box in self.boxes)
        return {
            "forward": read + per_pass,
            "backward": written + per_pass,
            "forward + backward": read + written + 2 * per_pass,
        }[direction]


def c4_inputs(device: str, boxes: Tensor, dtype: str, layout: str = "channels_last") -> Inputs:
    """`[K, 4]` boxes on the feature map of a C4."""
    return Inputs([c4_map(device, DTYPES[dtype], LAYOUTS[layout])], [boxes.to(device)], [C4.stride])


def torchvision_provider(dtype: str) -> str:
    """torchvision's name in the results: it pools half-precision features in float32, under autocast."""
    return "torchvision" if dtype == "float32" else "torchvision autocast"


def compare_passes(
    comparison: Comparison,
    name: str,
    direction: Direction,
    pools: Mapping[str, Pool],
    inputs: Inputs,
    *,
    bytes: int,
    flops: int,
    **options: Unpack[CaseOptions],
) -> None:
    """Compare one direction of pooling operators.

    Args:
        comparison: the fixture.
        name: the case's name, without the direction.
        direction: what is timed.
        pools: by provider, a function that pools `inputs`.
        inputs: see `Inputs`.
        bytes, flops: the work that any implementation has to do in this direction.
        options: see `CaseOptions`.
    """
    comparison.run(
        f"{direction}, {name}",
        passes(direction, pools, inputs.features),
        close(TOLERANCE[inputs.dtype]),
        bytes=bytes,
        flops=flops,
        # The rate in bfloat16 bounds all half precision: matrix products in float16 are slow on some CPUs.
        rate="float32" if inputs.dtype == "float32" else "bfloat16",
        # Autograd runs a backward on the stream of its forward, which is not the stream of the capture.
        capture=direction != "backward",
        **options,
    )


def passes(direction: Direction, pools: Mapping[str, Pool], features: Sequence[Tensor]) -> dict[str, Implementation]:
    """The calls to time, by provider: a forward, a backward of one graph that is kept, or both."""
    if direction == "forward":
        return {name: lambda pool=pool: _forward(pool, features) for name, pool in pools.items()}
    for feature in features:
        feature.requires_grad_()
    make = _backward if direction == "backward" else _forward_and_backward
    return {name: make(pool, features) for name, pool in pools.items()}


def _forward(pool: Pool, features: Sequence[Tensor]) -> Tensor:
    dtype, device = features[0].dtype, features[0].device.type
    half = dtype != torch.float32
    with (
        torch.set_grad_enabled(features[0].requires_grad),
        torch.autocast(device, dtype if half else None, enabled=half),
    ):
        return pool()


def _backward(pool: Pool, features: Sequence[Tensor]) -> Implementation:
    graph: list[Tensor] = []  # an output and its gradient, made by the first call

    def run() -> tuple[Tensor, ...]:
        if not graph:
            output = _forward(pool, features)
            graph.extend([output, _gradient(output)])
        output, gradient = graph
        return torch.autograd.grad(output, features, gradient, retain_graph=True)

    return run


def _forward_and_backward(pool: Pool, features: Sequence[Tensor]) -> Implementation:
    gradients: list[Tensor] = []  # a single one, made by the first call

    def run() -> tuple[Tensor, ...]:
        output = _forward(pool, features)
        if not gradients:
            gradients.append(_gradient(output))
        return torch.autograd.grad(output, features, gradients[0])

    return run


def _gradient(output: Tensor) -> Tensor:
    return torch.empty_like(output).copy_(torch.randn(output.shape, generator=generator(1)))
