"""What the benchmarks of pooling operators share: dtypes, layouts, and the passes that are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.harness.comparison import Race, close
from benchmarks.harness.machine import Call
from benchmarks.harness.workloads import generator

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
DIRECTIONS = ("forward", "backward")

Pool = Callable[[], Tensor]


def torchvision_in(dtype: str) -> str:
    """The peer's name: maps in half precision are pooled in float32 by torchvision, under autocast."""
    return "torchvision" if dtype == "float32" else "torchvision autocast"


def race_passes(
    race: Race, name: str, direction: str, pools: Mapping[str, Pool], maps: Sequence[Tensor], **options: object
) -> None:
    """Race one direction of pooling `maps`; `options` are the race's."""
    dtype = str(maps[0].dtype).removeprefix("torch.")
    race(
        name,
        passes(direction, pools, maps),
        close(TOLERANCE[dtype]),
        # Half precision is bounded by bfloat16's product: CPUs may have none that is fast in float16.
        rate="float32" if dtype == "float32" else "bfloat16",
        # Autograd runs a backward on the stream of its forward, which is not the capture's.
        capture=direction != "backward",
        **options,
    )


def passes(direction: str, pools: Mapping[str, Pool], maps: Sequence[Tensor]) -> dict[str, Call]:
    """The calls to time.

    Args:
        direction: "forward"; "backward", of one graph again and again; or "forward + backward".
        pools: by provider: pool `maps`.
        maps: all of one dtype.
    """
    dtype = maps[0].dtype
    autocast = torch.autocast(maps[0].device.type, None if dtype == torch.float32 else dtype, dtype != torch.float32)

    def forward(pool: Pool) -> Tensor:
        with torch.set_grad_enabled(direction != "forward"), autocast:
            return pool()

    def gradient(out: Tensor) -> Tensor:
        return torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator(1)))

    def backward(pool: Pool) -> Call:
        graph: list[Tensor] = []  # an output and its gradient, made when a provider is tried

        def run() -> tuple[Tensor, ...]:
            if direction == "backward":
                if not graph:
                    out = forward(pool)
                    graph.extend([out, gradient(out)])
                return torch.autograd.grad(graph[0], maps, graph[1], retain_graph=True)
            out = forward(pool)
            if not graph:
                graph.append(gradient(out))
            return torch.autograd.grad(out, maps, graph[0])

        return run

    if direction == "forward":
        return {name: lambda pool=pool: forward(pool) for name, pool in pools.items()}
    for feature in maps:
        feature.requires_grad_()
    return {name: backward(pool) for name, pool in pools.items()}
