"""The declaration of an operator: what the compile report and the tests need to know about it.

Each `benchmarks/bench_<operator>.py` declares `OPERATOR = Operator(...)`. The compile report and the tests of random
inputs, wrong arguments, GPUs and the package iterate over these declarations and name no operator themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]

Backend = Literal["cuda", "hip"]
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Call:
    """A call of a public function with keyword arguments."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    dynamic: bool = False  # the length of the result depends on values: on an accelerator the call synchronises

    def run(self) -> list[Tensor]:
        """The results, and the gradients of their sum with respect to each argument that requires one."""
        results = _flat(_bytes_of_text(self.function(**self.arguments)))
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
    """What a kernel may need, and whether the design promises 128-bit accesses to global memory.

    A register budget is what the kernel's largest variant needs, rounded up to the 8 registers that hardware allocates.
    All NVIDIA architectures share a limit. 16 bytes per thread are promised for warps of 32.
    """

    registers: int
    wide_loads: bool = False
    wide_stores: bool = False
    slow_paths: int | None = None  # of divisions and roots, on NVIDIA's architectures; None allows any number
    loop_slow_paths: int | None = None  # those in loops
    occupancy: float = 0.0  # the fraction of a multiprocessor's warps that must be resident
    # The limits of variants that are launched by cases with a text in their name alone; the first text that fits holds.
    for_cases: Mapping[str, Limit] = field(default_factory=dict)

    def of(self, cases: Iterable[str]) -> Limit:
        """The limit of the variant that these cases launch."""
        names = list(cases)
        fitting = (limit for text, limit in self.for_cases.items() if all(text in name for name in names))
        return next(fitting, self)


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel by a compile case."""

    kernel: str
    programs: int
    arguments: Mapping[str, Any]  # of the kernel, by name; tensors have no memory


Trips: TypeAlias = Mapping[str, float | tuple[float, ...]]


@dataclass(frozen=True)
class Work:
    """What one launch of a kernel does with the benchmark's inputs, for the static model.

    Loops and branches have the names of `reporting/source_map.py`. Every loop of the machine code needs its trips.
    """

    hbm_bytes: float  # that have to move: each input read once, each output written once
    l2_bytes: float  # of 32-byte sectors that programs request; what a program reads again is in L1
    # By loop: the mean number of iterations each time that it is reached. A tuple has a number for each of several
    # copies in the machine code, in its order: of two calls of a function, or of an unrolled loop and its remainder.
    # 0.0 holds for all copies of a loop that is never reached.
    trips: Trips = field(default_factory=dict)
    branches: Mapping[str, float] = field(default_factory=dict)  # by the start of a condition: how often it holds
    longest: Trips = field(default_factory=dict)  # trips of the program that takes longest, where they differ
    shared_bytes: float = 0  # distinct bytes that programs read in no order, and so again
    reread_bytes: float = 0  # how many they read beyond these: from HBM in so far as L2 does not hold the shared bytes


@dataclass(frozen=True)
class ModelTarget:
    """The most microseconds that the static model may give the kernels of a case on an H200."""

    case: str
    kernels: tuple[str, ...]
    microseconds: float


@dataclass(frozen=True)
class Fence:
    """A barrier that must be between a store and the loads of a kernel that read what other threads stored."""

    kernel: str
    store: str  # part of the store's line in the source
    load: str  # part of the load's line


class Draw(Protocol):
    """Draws one random case; a property test shrinks what it draws."""

    def integer(self, low: int, high: int) -> int: ...

    def number(self, low: float, high: float) -> float: ...

    def choice(self, options: Sequence[Choice]) -> Choice: ...


@dataclass(frozen=True)
class Operator:
    """The declaration of one operator."""

    calls: Callable[[str, int], list[Call]]  # (device, seed): small valid calls of every public function
    compile_cases: Mapping[str, Callable[[], Call]]  # by name: a call of the paper's size on meta tensors
    limits: Mapping[str, Mapping[Backend, Limit]]  # by the kernel's name
    check_random: Callable[[Draw, str], None]  # (draw, device): asserts that a random case agrees with an oracle
    check_large: Callable[[str], None] | None = None  # (device): asserts that more than 2^31 elements work
    # By name: (device), asserts that a small call of one variant of the kernels agrees with torchvision or an oracle.
    variants: Mapping[str, Callable[[str], None]] = field(default_factory=dict)
    models: Mapping[str, Callable[[Launch], Work]] = field(default_factory=dict)  # by the kernel's name
    targets: Sequence[ModelTarget] = ()
    fences: Sequence[Fence] = ()


def operators() -> dict[str, Operator]:
    """The declarations of all `benchmarks/bench_<operator>.py`, by the operator's name."""
    names = [path.stem for path in sorted(ROOT.glob("benchmarks/bench_*.py"))]
    modules = {name.removeprefix("bench_"): importlib.import_module(f"benchmarks.{name}") for name in names}
    return {name: module.OPERATOR for name, module in modules.items() if hasattr(module, "OPERATOR")}


def _bytes_of_text(value: object) -> object:
    """A result whose text became tensors of its bytes; dictionaries become lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8, device="cpu")
    return [_bytes_of_text(item) for item in value] if isinstance(value, list | tuple) else value


def _flat(value: object) -> list[Tensor]:
    """The tensors in a value: the value itself, or the tensors of a list or tuple."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _flat(item)] if isinstance(value, list | tuple) else []


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """A tensor without memory, for `Operator.compile_cases`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
