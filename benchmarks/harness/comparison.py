"""Everyone who can run a workload is checked, then timed in turn.

The order matters. All providers run once, and must agree with ours, before any clock starts. Then they take turns, one
call each a round, so that a machine's moods fall on all of them; ours is the call that pytest-benchmark times. On a GPU
each is then timed by device events as well. docs/benchmarks.md says what each figure means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.machine import Call, Machine
from benchmarks.reporting.results import OURS, Case, Kind, is_ours

# A round is one call of each provider.
SLOW = 10.0  # seconds: of rounds that take longer, one
MOST = 50  # rounds

DISAGREES = "its result is not ours"


def parameters(rows: Iterable[tuple], quick: Callable[..., bool]) -> list[Any]:
    """Rows of `pytest.mark.parametrize`, marked where `quick(*row)`."""
    return [pytest.param(*row, marks=[pytest.mark.quick] if quick(*row) else []) for row in rows]


def close(tolerance: float) -> Callable[[object, object], bool]:
    """Whether tensors differ by at most so much of the largest magnitude."""

    def same(ours: object, theirs: object) -> bool:
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        return all((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max() for a, b in pairs)

    return same


class Race:
    """The fixture of a benchmark: `race(name, {"fastmask": ours, "torchvision": theirs}, ...)`."""

    def __init__(
        self, benchmark: BenchmarkFixture, machine: Machine, done: Callable[[Case], None], *, quick: bool
    ) -> None:
        self.benchmark = benchmark
        self.machine = machine
        self.done = done
        self.quick = quick
        self.device = machine.device
        self.on_gpu = machine.on_gpu
        self.main_dtype = "bfloat16" if machine.on_gpu else "float32"  # what detectors run in there

    def __call__(
        self,
        name: str,
        providers: Mapping[str, Call],
        same: Callable[[object, object], bool],
        *,
        kind: Kind = "paper",
        bytes: int | None = None,
        flops: int | None = None,
        rate: str = "float32",
        target: Mapping[Literal["cpu", "gpu"], float] | None = None,
        missing: Mapping[str, str] | None = None,
        events: bool = True,
        capture: bool = True,
        stages: Mapping[str, Callable[[], dict[str, float]]] | None = None,
        **more: object,
    ) -> None:
        """Check, time and record one case.

        Args:
            name: of the case, unique in its section.
            providers: by name, `OURS` among them. A peer that raises a RuntimeError is recorded as missing.
            same: whether ours and a peer's results agree.
            kind: see `results.Case`.
            bytes, flops: of the operator's own model.
            rate: dtype of the matrix product whose rate bounds `flops`.
            target: how many times as fast as torchvision it has to be.
            missing: providers that are not here, and why.
            events: also time by device events, or by the host's clock alone, as whole detectors are.
            capture: also replay in a CUDA graph what is ours and does not wait.
            stages: by provider, what measures its stages, called when everything is timed.
            more: other fields of `results.Case`.
        """
        machine = self.machine
        calls, first_ms, missing = self._checked(name, providers, same, dict(missing or {}))
        ours = calls[OURS]
        if self.benchmark.disabled:  # --benchmark-disable, or pytest-xdist: checks alone
            self.benchmark.pedantic(ours)
            return
        rounds = self._rounds(calls, first_ms)
        latencies: dict[str, list[float]] = {provider: [] for provider in calls}

        def others() -> None:
            for provider, call in calls.items():
                if provider != OURS:
                    latencies[provider].append(machine.clock(call))

        self.benchmark.pedantic(lambda: machine.finish(ours), setup=others, rounds=rounds)
        latencies[OURS] = [1e3 * seconds for seconds in self.benchmark.stats.stats.data]
        timings = {
            provider: machine.time(call, latencies[provider], events=events, capture=capture and is_ours(provider))
            for provider, call in calls.items()
        }
        self.done(
            Case(
                name,
                kind,
                timings,
                missing=missing,
                bytes=bytes,
                flops=flops,
                floor_ms=None if bytes is None else machine.floor_ms(bytes, flops or 0, rate),
                target=(target or {}).get("gpu" if self.on_gpu else "cpu"),
                stages={provider: measure() for provider, measure in (stages or {}).items() if provider in calls},
                **more,
            )
        )

    def _checked(
        self, name: str, providers: Mapping[str, Call], same: Callable[[object, object], bool], missing: dict[str, str]
    ) -> tuple[dict[str, Call], float, dict[str, str]]:
        """Those that run and agree with ours, how long all took, and why the others do not run."""
        start = time.perf_counter()
        expected = self.machine.finish(providers[OURS])
        calls = {OURS: providers[OURS]}
        for provider, call in providers.items():
            if provider == OURS:
                continue
            try:
                result = self.machine.finish(call)
            except RuntimeError as error:  # no such dtype, no memory, nothing to compile with
                if is_ours(provider):
                    raise
                missing[provider] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            if same(expected, result):
                calls[provider] = call
                continue
            # Others come in any version, and round where they like: but somebody has to agree.
            may_differ = provider != "torchvision" and not is_ours(provider)
            assert may_differ, f"{name}: {provider}'s result is not ours, nothing was timed"
            missing[provider] = DISAGREES
        assert len(calls) > 1 or DISAGREES not in missing.values(), (
            f"{name}: nobody's result is ours, nothing was timed"
        )
        return calls, (time.perf_counter() - start) * 1e3, missing

    def _rounds(self, calls: Mapping[str, Call], first_ms: float) -> int:
        """As many as there is time for. A second call says how long they take: the first may have compiled."""
        if first_ms > 1e3 * SLOW and not self.on_gpu and "torch.compile" not in calls:
            return 1
        seconds = sum(self.machine.clock(call) for call in calls.values()) / 1e3
        if seconds > SLOW:
            return 1
        budget, least = (0.3, 1) if self.quick else (0.3 if self.on_gpu else 2.0, 3)
        return max(least, min(MOST, int(budget / max(seconds, 1e-6))))
