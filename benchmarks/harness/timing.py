"""How a call is timed: by the host's clock on any device, by device events and in a CUDA graph on a GPU."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch

from benchmarks.reporting.results import Spread, Timing

Implementation = Callable[[], object]  # one provider's implementation of a workload, on inputs that it holds

QUANTILES = (0.2, 0.5, 0.8)
DEVICE_MS = 20  # how long calls are repeated for each figure by device events
SLEEP_CYCLES = 1_000_000  # about half a millisecond, in which the device sleeps while the host enqueues a call


def spread(milliseconds: Sequence[float]) -> Spread:
    """The 20th percentile, the median and the 80th percentile."""
    if len(milliseconds) == 1:
        return Spread(*list(milliseconds) * 3)
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Spread(fifths[0], statistics.median(milliseconds), fifths[-1])


class Timer:
    """The clocks of one device.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type != "cpu"

    def finish(self, call: Implementation) -> object:
        """Call, synchronise, and return the result."""
        result = call()
        if self.on_gpu:
            torch.cuda.synchronize()
        return result

    def clock(self, call: Implementation) -> float:
        """Milliseconds of the host's clock until the device is done."""
        start = time.perf_counter()
        self.finish(call)
        return (time.perf_counter() - start) * 1e3

    def fastest(self, call: Implementation) -> float:
        """Milliseconds of the fastest of several calls, the one that other processes disturbed least."""
        if self.on_gpu:
            from triton import testing

            return testing.do_bench(call, DEVICE_MS, 3 * DEVICE_MS, return_mode="min")  # pyright: ignore[reportReturnType] a float in this mode
        best = self.clock(call)
        for _ in range(int(200 / best)):
            best = min(best, self.clock(call))
        return best

    def describe(
        self, call: Implementation, latencies: Sequence[float], *, events: bool = True, capture: bool = True
    ) -> Timing:
        """All figures of one provider.

        Args:
            call: what is timed.
            latencies: milliseconds of the host's clock, one per round.
            events: also time by device events, on a GPU.
            capture: also time replays of a CUDA graph, on a GPU, if the call does not synchronise.
        """
        latency = spread(latencies)
        if not self.on_gpu:
            return Timing(latency, len(latencies))
        syncs, peak_mib = _syncs_and_peak(call)
        cold = warm = graph = None
        if events:
            rounds = max(5, min(50, int(DEVICE_MS / latency.median)))
            cold, warm = _by_events(call, rounds, cold=True), _by_events(call, rounds, cold=False)
            if capture and not syncs:
                graph = _by_graph(call)
        return Timing(latency, len(latencies), cold, warm, graph, syncs, peak_mib)


def _by_graph(call: Implementation) -> Spread:
    """Milliseconds of a call among many in one CUDA graph."""
    from triton import testing

    times = testing.do_bench_cudagraph(call, rep=DEVICE_MS // 4, quantiles=list(QUANTILES))
    assert isinstance(times, list)
    return Spread(*times)


def _by_events(call: Implementation, rounds: int, *, cold: bool) -> Spread:
    """Milliseconds by device events. The device sleeps before each call, until the host has enqueued the call."""
    junk = torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    call()
    for start, end in events:
        if cold:
            junk.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return spread([start.elapsed_time(end) for start, end in events])


def _syncs_and_peak(call: Implementation) -> tuple[int, float]:
    """The number of host-device synchronisations of a call, and the most MiB that it allocates beyond its inputs."""
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
    syncs = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return syncs, (torch.cuda.max_memory_allocated() - before) / 2**20
