"""What the project knows of its operators, declared once each.

`benchmarks/bench_<operator>.py` has `OPERATOR = Operator(...)`. The compile report and the tests of GPUs, random
inputs, wrong arguments and the package go through these declarations and name no operator themselves.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]

Backend = Literal["cuda", "hip"]
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Call:
    """A call of a public function with keyword arguments.

    Where tensors among the arguments require gradients, `run` also computes these.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    dynamic: bool = False  # the result's length is data: on an accelerator the call synchronises

    def run(self) -> list[Tensor]:
        """The results, and the gradients of their sum with respect to what requires them."""
        results = _flat(self.function(**self.arguments))
        leaves = [tensor for tensor in self.tensors() if tensor.requires_grad]
        outputs = [result for result in results if result.requires_grad]
        if leaves and outputs:
            results += torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
        return results

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, also those in lists."""
        return [tensor for value in self.arguments.values() for tensor in _flat(value)]


@dataclass(frozen=True)
class Limit:
    """A register budget, and whether the design promises 128-bit accesses to global memory."""

    registers: int
    wide_loads: bool = False
    wide_stores: bool = False


class Draw(Protocol):
    """Draws one random case; a property test shrinks what it draws."""

    def integer(self, low: int, high: int) -> int: ...

    def number(self, low: float, high: float) -> float: ...

    def choice(self, options: Sequence[Choice]) -> Choice: ...


@dataclass(frozen=True)
class Operator:
    """The declaration of one operator."""

    calls: Callable[[str, int], list[Call]]  # small valid calls of every public function: of a device and a seed
    compile_cases: Mapping[str, Callable[[], Call]]  # calls of the paper's size on meta tensors, by name
    limits: Mapping[str, Mapping[Backend, Limit]]  # by the kernel's name
    check_random: Callable[[Draw, str], None]  # asserts agreement with an oracle on a random case, on a device
    check_large: Callable[[str], None] | None = field(default=None)  # asserts that more than 2^31 elements work


def operators(folder: Path = ROOT / "benchmarks") -> dict[str, Operator]:
    """The declarations of all `bench_<operator>.py` in a folder, by the operator's name."""
    return {name: module.OPERATOR for name, module in _modules(folder) if hasattr(module, "OPERATOR")}


def _modules(folder: Path) -> Iterator[tuple[str, Any]]:
    package = folder.name
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))
    for path in sorted(folder.glob("bench_*.py")):
        yield path.stem.removeprefix("bench_"), importlib.import_module(f"{package}.{path.stem}")


def _flat(value: object) -> list[Tensor]:
    """The tensors in a value: itself, or those of a list or tuple."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _flat(item)] if isinstance(value, list | tuple) else []


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """A tensor without memory, for `Operator.compile_cases`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
