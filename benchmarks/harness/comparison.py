"""The comparison of providers on one workload: all are checked, then timed in turn.

All providers run once, and must agree with fastmask, before anything is timed. Then they take turns, one call each in a
round, so that the drift of the machine affects all of them alike; fastmask is the call that pytest-benchmark times. On
a GPU each is then timed by device events as well. docs/benchmarks.md says what each figure means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypedDict, Unpack

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.checks import Checked, Same, check
from benchmarks.harness.machine import Machine
from benchmarks.harness.timing import Implementation
from benchmarks.reporting.results import FASTMASK, Case, Kind, is_fastmask

SLOW_SECONDS = 10.0  # a workload whose round takes longer has one round, or three if it has a target
MAX_ROUNDS = 50

Stages = Mapping[str, Callable[[], dict[str, float]]]
Target = Mapping[Literal["cpu", "gpu"], float] | None


class Work(TypedDict):
    """The work that any implementation has to do. The docstring of each `bench_*.py` says how it is counted."""

    bytes: int
    flops: int


class CaseOptions(TypedDict, total=False):
    """Options of a case."""

    kind: Kind  # "paper" unless given
    target: Target  # how many times as fast as torchvision fastmask has to be
    axis: str  # for a scaling case: the quantity that grows
    at: float  # for a scaling case: the value of that quantity


class Comparison:
    """The fixture of a benchmark: `comparison.run(name, {"fastmask": ..., "torchvision": ...}, same, ...)`."""

    def __init__(
        self, benchmark: BenchmarkFixture, machine: Machine, record: Callable[[Case], None], *, quick: bool
    ) -> None:
        self.benchmark = benchmark
        self.machine = machine
        self.record = record
        self.quick = quick
        self.device = machine.device
        self.on_gpu = machine.on_gpu
        self.main_dtype = "bfloat16" if machine.on_gpu else "float32"  # the dtype of detectors on this device

    def run(
        self,
        name: str,
        providers: Mapping[str, Implementation],
        same: Same,
        *,
        bytes: int | None = None,
        flops: int | None = None,
        rate: str = "float32",
        missing: Mapping[str, str] | None = None,
        events: bool = True,
        capture: bool = True,
        images: int | None = None,
        stages: Stages | None = None,
        **options: Unpack[CaseOptions],
    ) -> None:
        """Check, time and record one case.

        Args:
            name: the case's name, unique in its section.
            providers: by name, `FASTMASK` among them. A peer that raises a RuntimeError is recorded as missing.
            same: whether fastmask's result and another's agree.
            bytes: the bytes that any implementation has to move.
            flops: the operations that any implementation has to compute.
            rate: the dtype of the matrix product whose rate bounds `flops`.
            missing: providers that are not available, and why.
            events: also time by device events; False for whole detectors, which are timed by the host's clock alone.
            capture: also time fastmask in a CUDA graph, if it does not synchronise.
            images: for an end-to-end case, the number of images in a batch.
            stages: by provider, a function that measures its stages; called after all timing.
            options: see `CaseOptions`.
        """
        checked = check(name, providers, same, missing or {}, self.machine.timer)
        if self.benchmark.disabled:  # by --benchmark-disable or pytest-xdist
            self.benchmark.pedantic(checked.calls[FASTMASK])
            return
        latencies = self._latencies(checked, slow_rounds=3 if options.get("target") and not self.quick else 1)
        timings = {
            provider: self.machine.timer.describe(
                call, latencies[provider], events=events, capture=capture and is_fastmask(provider)
            )
            for provider, call in checked.calls.items()
        }
        self.record(
            Case(
                name,
                options.get("kind", "paper"),
                timings,
                missing=checked.missing,
                bytes=bytes,
                flops=flops,
                floor_ms=None if bytes is None else self.machine.floor_ms(bytes, flops or 0, rate),
                target=(options.get("target") or {}).get("gpu" if self.on_gpu else "cpu"),
                axis=options.get("axis"),
                at=options.get("at"),
                images=images,
                stages={name: measure() for name, measure in (stages or {}).items() if name in checked.calls},
            )
        )

    def _latencies(self, checked: Checked, slow_rounds: int) -> dict[str, list[float]]:
        """For each provider, milliseconds by the host's clock in each round."""
        timer = self.machine.timer
        latencies: dict[str, list[float]] = {provider: [] for provider in checked.calls}

        def time_peers() -> None:
            for provider, call in checked.calls.items():
                if provider != FASTMASK:
                    latencies[provider].append(timer.clock(call))

        rounds = self._rounds(checked, slow_rounds)
        self.benchmark.pedantic(lambda: timer.finish(checked.calls[FASTMASK]), setup=time_peers, rounds=rounds)
        assert self.benchmark.stats is not None
        latencies[FASTMASK] = [1e3 * seconds for seconds in self.benchmark.stats.stats.data]
        return latencies

    def _rounds(self, checked: Checked, slow_rounds: int) -> int:
        """The number of rounds that fit the time budget, estimated from second calls: first calls may compile."""
        if checked.milliseconds > 1e3 * SLOW_SECONDS and not self.on_gpu and "torch.compile" not in checked.calls:
            return slow_rounds
        seconds = sum(self.machine.timer.clock(call) for call in checked.calls.values()) / 1e3
        if seconds > SLOW_SECONDS:
            return slow_rounds
        budget, least = (0.3, 1) if self.quick else (0.3 if self.on_gpu else 2.0, 3)
        return max(least, min(MAX_ROUNDS, int(budget / max(seconds, 1e-6))))
