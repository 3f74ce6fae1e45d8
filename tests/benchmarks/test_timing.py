"""Timing: quantiles, and the figures that only a GPU has, on a simulated device."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness.timing import Timer, spread
from benchmarks.reporting.results import Spread

pytestmark = pytest.mark.reference_only


def test_spread():
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Spread(2.0, 3.5, 5.0)


class Event:
    """An event of a simulated device, on which every call takes 4 ms."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.filterwarnings("ignore:called a synchronizing")
@pytest.mark.parametrize("synchronises", [False, True])
def test_figures_of_a_gpu(monkeypatch, synchronises):
    def call():
        Event.now += 4.0
        if synchronises:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    testing = pytest.importorskip("triton.testing")
    modes = []
    for name, value in {
        "Event": Event,
        "synchronize": lambda: None,
        "set_sync_debug_mode": modes.append,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 3 * 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=64))
    monkeypatch.setattr(torch, "empty", lambda size, **_: torch.ones(size))
    monkeypatch.setattr(testing, "do_bench_cudagraph", lambda *_, rep, quantiles: [rep * q for q in quantiles])
    timer = Timer("cuda")

    timing = timer.describe(call, [6.0, 5.0, 7.0])
    assert timing.time == timing.cold == timing.warm == Spread(4.0, 4.0, 4.0)
    assert timing.latency.median == 6.0
    assert timing.syncs == synchronises
    assert (timing.graph is None) == synchronises  # a capture forbids synchronisations
    assert timing.peak_mib == 2
    assert modes == ["warn", "default"]
    assert timer.describe(call, [6.0], capture=False).graph is None
    whole = timer.describe(call, [6.0], events=False, capture=False)
    assert (whole.cold, whole.warm, whole.graph, whole.time.median) == (None, None, None, 6.0)
