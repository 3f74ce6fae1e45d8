"""The machine that is measured: its clocks, its two limits, and what a GPU alone can tell of a call."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import torch
from pytest_benchmark.utils import get_commit_info
from triton import testing

import fastmask
from benchmarks.reporting.results import Run, Spread, Timing

Call = Callable[[], object]

PEERS = {"detectron2": "detectron2.layers", "mmcv": "mmcv.ops"}  # timed where these modules can be imported
QUANTILES = [0.2, 0.5, 0.8]
DEVICE_MS = 20  # of calls, for each figure by device events
AHEAD = 1_000_000  # cycles for which the device sleeps, some half a millisecond, while the host enqueues a call


def peer(module: str) -> ModuleType | None:
    """Somebody else's module, or None where it cannot be imported."""
    try:
        return import_module(module)
    except ImportError:
        return None


def spread(milliseconds: list[float]) -> Spread:
    if len(milliseconds) == 1:
        return Spread(*milliseconds * 3)
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Spread(fifths[0], statistics.median(milliseconds), fifths[-1])


class Machine:
    """The device that is measured, and its two limits, taken once in a run."""

    def __init__(self, device: str, threads: int | None = None) -> None:
        self.device = device
        self.on_gpu = torch.device(device).type != "cpu"
        if threads:
            torch.set_num_threads(threads)
        self.copy_gb_s = self._copy_rate()
        self.matrix_tflop_s = {
            str(dtype).removeprefix("torch."): self._matrix_rate(dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        }

    def finish(self, call: Call) -> object:
        """Call, and wait until the device is done."""
        result = call()
        if self.on_gpu:
            torch.cuda.synchronize()
        return result

    def clock(self, call: Call) -> float:
        """Milliseconds until the device is done."""
        start = time.perf_counter()
        self.finish(call)
        return (time.perf_counter() - start) * 1e3

    def floor_ms(self, bytes: int, flops: int, dtype: str) -> float:
        """So many bytes at the speed of a copy, or so many operations at that of a matrix product."""
        return max(bytes / self.copy_gb_s / 1e6, flops / self.matrix_tflop_s[dtype] / 1e9)

    def run(self, *, quick: bool) -> Run:
        """What a section says of where it was measured."""
        peers = {name: peer(module) for name, module in PEERS.items()}
        return Run(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=get_commit_info()["id"] + "-dirty" * _changed(),
            device=torch.cuda.get_device_name() if self.on_gpu else "cpu",
            driver=_driver() if self.on_gpu else None,
            threads=torch.get_num_threads(),
            versions={
                "python": platform.python_version(),
                "fastmask": fastmask.__version__,
                **{name: metadata.version(name) for name in ("torch", "torchvision", "triton", "numpy")},
                **{name: str(import_module(name).__version__) for name, found in peers.items() if found},
            },
            copy_gb_s=self.copy_gb_s,
            matrix_tflop_s=self.matrix_tflop_s,
            quick=quick,
            unavailable={name: "cannot be imported" for name, found in peers.items() if not found},
        )

    def time(self, call: Call, latencies: list[float], *, events: bool, capture: bool) -> Timing:
        """All that is said of one provider, given what the host's clock saw."""
        latency = spread(latencies)
        if not self.on_gpu:
            return Timing(latency, len(latencies))
        waits, peak_mib = _waits_and_peak(call)
        cold = warm = graph = None
        if events:
            rounds = max(5, min(50, int(DEVICE_MS / latency.median)))
            cold, warm = _by_events(call, rounds, cold=True), _by_events(call, rounds, cold=False)
            if capture and not waits:  # many calls in one graph
                graph = Spread(*testing.do_bench_cudagraph(call, rep=DEVICE_MS // 4, quantiles=QUANTILES))
        return Timing(latency, len(latencies), cold, warm, graph, waits, peak_mib)

    def _copy_rate(self) -> float:
        size = 2**30 if self.on_gpu else 2**27
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self._best_ms(lambda: target.copy_(source)) / 1e6

    def _matrix_rate(self, dtype: torch.dtype) -> float:
        size = 8192 if self.on_gpu else 1024
        a, b = torch.randn(2, size, size, device=self.device, dtype=dtype)
        return 2 * size**3 / self._best_ms(lambda: a @ b) / 1e9

    def _best_ms(self, call: Call) -> float:
        """The fastest of some calls: a limit is what the machine can do when nothing is in its way."""
        if self.on_gpu:
            return testing.do_bench(call, DEVICE_MS, 3 * DEVICE_MS, return_mode="min")
        best = self.clock(call)
        for _ in range(int(200 / best)):
            best = min(best, self.clock(call))
        return best


def _changed() -> bool:
    """Whether the code that runs differs from its commit."""
    command = ["git", "status", "--porcelain", "--", "fastmask", "models", "benchmarks", ":!benchmarks/results"]
    try:
        return bool(subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False).stdout)
    except FileNotFoundError:  # no git, and so no commit
        return False


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver; others have none of their own."""
    path = "/proc/driver/nvidia/version"
    try:
        with open(path) as file:
            words = file.readline().split()
    except FileNotFoundError:
        return None
    return next((word for word in words if word[0].isdigit()), None)


def _by_events(call: Call, rounds: int, *, cold: bool) -> Spread:
    """Milliseconds of the device, which first sleeps so that launches are not what is waited for."""
    junk = torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    call()
    for start, end in events:
        if cold:
            junk.zero_()
        torch.cuda._sleep(AHEAD)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return spread([start.elapsed_time(end) for start, end in events])


def _waits_and_peak(call: Call) -> tuple[int, float]:
    """How often a call waits for the device, and MiB allocated at most beyond what there was."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return waits, (torch.cuda.max_memory_allocated() - before) / 2**20
