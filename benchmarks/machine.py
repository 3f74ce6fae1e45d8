"""The machine that is measured: its clocks, its two limits, and what a GPU alone can tell of a call."""

from __future__ import annotations

import importlib.util
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata

import torch
from pytest_benchmark.utils import get_commit_info
from triton import testing

import fastmask
from benchmarks.results import Run, Spread, Timing

Call = Callable[[], object]

PEERS = ("detectron2", "mmcv")  # timed where they can be imported
QUANTILES = [0.2, 0.5, 0.8]
DEVICE_MS = 20  # of warm-up and of timing, for each figure by device events


def spread(milliseconds: list[float]) -> Spread:
    if len(milliseconds) == 1:
        return Spread(*milliseconds * 3)
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Spread(fifths[0], statistics.median(milliseconds), fifths[-1])


class Machine:
    """The device that is measured, and its two limits, taken once in a run."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.on_gpu = torch.device(device).type != "cpu"
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
        """What no program can beat: memory at the speed of a copy, arithmetic at that of a matrix product."""
        return max(bytes / self.copy_gb_s / 1e6, flops / self.matrix_tflop_s[dtype] / 1e9)

    def run(self, *, quick: bool) -> Run:
        """What a section says of where it was measured."""
        commit = get_commit_info()
        names = ["torch", "torchvision", "triton", "numpy", *PEERS]
        return Run(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=commit["id"] + "-dirty" * commit["dirty"],
            device=torch.cuda.get_device_name() if self.on_gpu else "cpu",
            driver=_driver() if self.on_gpu else None,
            threads=torch.get_num_threads(),
            versions={
                "python": platform.python_version(),
                "fastmask": fastmask.__version__,
                **{name: metadata.version(name) for name in names if importlib.util.find_spec(name)},
            },
            copy_gb_s=self.copy_gb_s,
            matrix_tflop_s=self.matrix_tflop_s,
            quick=quick,
            unavailable={name: "not installed" for name in PEERS if importlib.util.find_spec(name) is None},
        )

    def time(self, call: Call, latencies: list[float], *, events: bool, capture: bool) -> Timing:
        """All that is said of one provider, given what the host's clock saw."""
        latency = spread(latencies)
        if not self.on_gpu:
            return Timing(latency, len(latencies))
        waits, peak_mib = _waits_and_peak(call)
        cold = warm = graph = None
        if events:
            cold = Spread(*testing.do_bench(call, DEVICE_MS, DEVICE_MS, quantiles=QUANTILES))
            warm = _warm(call, rounds=max(3, min(50, int(DEVICE_MS / latency.median))))
            graph = _graph(call) if capture and not waits else None
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


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver; others have none of their own."""
    path = "/proc/driver/nvidia/version"
    try:
        with open(path) as file:
            words = file.readline().split()
    except FileNotFoundError:
        return None
    return next((word for word in words if word[0].isdigit()), None)


def _warm(call: Call, rounds: int) -> Spread:
    """Back to back: L2 holds what it can of the call before, and the host may be what limits."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    call()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return spread([start.elapsed_time(end) for start, end in events])


def _graph(call: Call) -> Spread | None:
    """Many calls in one CUDA graph: no launches to wait for, L2 warm."""
    try:
        return Spread(*testing.do_bench_cudagraph(call, rep=DEVICE_MS // 4, quantiles=QUANTILES))
    except RuntimeError:  # what is not allowed in a capture, each operator's implementation decides
        return None


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
