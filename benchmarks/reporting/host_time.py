"""Host time of the operators' launchers, on a machine without a GPU.

    python -m benchmarks host-time [--only OPERATOR]

calls each launcher with the meta tensors of the operator's compile cases, under a Triton driver that compiles and loads
nothing and launches nothing. What is left is the time that Python, PyTorch and Triton take for each call, without the
driver's own launch. It is compared with that of an empty kernel in the same run, which cancels the machine's speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.harness.operators import Operator, operators
from fastmask.kernels._runtime import LAUNCHERS, jit

CALLS, BLOCKS = 20, 30


@dataclass(frozen=True)
class HostTime:
    """One launcher's time."""

    operator: str
    case: str
    launcher: str
    kernels: int  # launched by a call
    microseconds: float
    ratio: float  # to an empty kernel


class HostDriver:
    """The part of a Triton driver that launching needs; `launched` lists what kernels were launched with."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.stream = target, 0
        # Triton caches what it has loaded by device, and what this driver "loads" can serve no other driver.
        self.device = object()
        self.launched: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _device: {"max_shared_mem": 2**20},
            load_binary=lambda name, *_: (name, name, 0, 0, 1024),  # module, function, registers, spills, threads
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, _device: object) -> int:
        return self.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def launcher_cls(self, source: Any, _metadata: Any) -> Callable[..., None]:
        """Triton makes one for each compiled variant, and calls it with the launch's arguments."""
        variant, launched = source.hash(), self.launched
        return lambda *arguments: launched.append((variant, *arguments))


@contextmanager
def host_driver() -> Iterator[HostDriver]:
    """Replace Triton's driver."""
    driver = HostDriver(GPUTarget("cuda", 90, 32))
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        yield driver


@jit()
def _empty():
    pass


def _best(call: Callable[[], object], driver: HostDriver) -> float:
    """Microseconds of a call: the least mean of several blocks, by the process's own time."""
    call()
    least = float("inf")
    for _ in range(BLOCKS):
        start = time.process_time_ns()
        for _ in range(CALLS):
            call()
        least = min(least, time.process_time_ns() - start)
        driver.launched.clear()
    return least / CALLS / 1e3


@contextmanager
def recorded_launchers() -> Iterator[list[tuple[str, Callable[[], object]]]]:
    """Send meta tensors to the launchers, and list their names and calls."""
    calls: list[tuple[str, Callable[[], object]]] = []

    def recorder(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            calls.append((name, lambda: launch(*arguments)))
            return launch(*arguments)

        return record

    library = torch.library.Library("fastmask", "IMPL")
    for name, launch in LAUNCHERS.items():
        library.impl(name, recorder(name, launch), "Meta", allow_override=True)
    try:
        yield calls
    finally:
        library._destroy()


def measure(declared: Mapping[str, Operator]) -> list[HostTime]:
    """The time of every launcher of every compile case."""
    rows = []
    with host_driver() as driver, recorded_launchers() as calls:
        for operator, declaration in declared.items():
            for case, call in declaration.compile_cases.items():
                calls.clear()
                call().run()
                for launcher, repeat in list(calls):
                    driver.launched.clear()
                    repeat()
                    kernels = len(driver.launched)
                    empty, microseconds = _best(lambda: _empty[(1,)](), driver), _best(repeat, driver)
                    rows.append(HostTime(operator, case, launcher, kernels, microseconds, microseconds / empty))
    return rows


def main(only: Sequence[str] | None) -> int:
    """Print a table of all operators, or some."""
    declared = operators()
    print("| operator | case | launcher | kernels | host time, us | empty kernels |\n|---|---|---|--:|--:|--:|")
    for row in measure({name: operator for name, operator in declared.items() if not only or name in only}):
        cells = row.operator, row.case, f"`{row.launcher}`", row.kernels, f"{row.microseconds:.1f}", f"{row.ratio:.1f}"
        print(f"| {' | '.join(map(str, cells))} |")
    return 0
