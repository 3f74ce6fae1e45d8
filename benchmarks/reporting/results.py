"""The results of a run of the benchmarks: `benchmarks/results/<device>.json`, read by `report` and `compare`.

A file has a section for each `bench_<section>.py`. Each section says when, where and at which commit it was measured,
so that an interrupted run can go on with the sections that are missing. Times are milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parents[1] / "results"

FASTMASK = "fastmask"
TORCHVISION = ("torchvision", "torchvision autocast")  # ratios and targets compare with whichever of these ran

Kind = Literal["paper", "adversarial", "scaling"]


def is_fastmask(provider: str) -> bool:
    """Whether it is fastmask in some form: "fastmask", "fastmask bf16"."""
    return provider.startswith(FASTMASK)


@dataclass(frozen=True)
class Spread:
    """Quantiles over the rounds."""

    p20: float
    median: float
    p80: float


@dataclass(frozen=True)
class Timing:
    """One provider of one case. Figures that exist on a GPU only are None on a CPU."""

    latency: Spread  # from the call until the device is done, by the host's clock
    rounds: int
    cold: Spread | None = None  # device events, L2 flushed before each call
    warm: Spread | None = None  # device events, L2 as the previous call left it
    graph: Spread | None = None  # replays of a CUDA graph; None if it cannot be captured
    syncs: int | None = None  # host-device synchronisations of a call
    peak_mib: float | None = None  # the most that a call allocates beyond its inputs

    @property
    def time(self) -> Spread:
        """The time that ratios use: by device events where there are any, otherwise by the host's clock."""
        return self.cold or self.latency


@dataclass(frozen=True)
class Case:
    """One workload and all providers that ran it."""

    name: str
    kind: Kind
    timings: dict[str, Timing]  # by provider, FASTMASK among them
    missing: dict[str, str] = field(default_factory=dict)  # by provider: why it has no timing
    bytes: int | None = None  # the bytes that have to move: each input read once, each output written once
    flops: int | None = None  # a multiply-add is two
    floor_ms: float | None = None  # for these bytes and FLOPs, at the rates measured in this run
    target: float | None = None  # how many times as fast as torchvision, or else the fastest peer, fastmask has to be
    axis: str | None = None  # for a scaling case: the quantity that grows
    at: float | None = None  # for a scaling case: the value of that quantity
    images: int | None = None  # for an end-to-end case: the images in a batch
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # by provider and stage: milliseconds

    @property
    def model(self) -> str:
        """The preset of an end-to-end case, with whose name the name of the case begins."""
        return self.name.split(",")[0]

    @property
    def meets_target(self) -> bool | None:
        """Whether fastmask is as fast as the target asks; None without a target or without a peer."""
        others = [timing for name, timing in self.timings.items() if not is_fastmask(name)]
        peer = self.torchvision() or min(others, key=lambda timing: timing.time.median, default=None)
        ratio = self._ratio(peer, FASTMASK)
        return None if ratio is None or self.target is None else ratio >= self.target

    def torchvision(self) -> Timing | None:
        """torchvision's timing, in whichever form it ran."""
        return next((self.timings[name] for name in TORCHVISION if name in self.timings), None)

    def ratio(self, provider: str = FASTMASK) -> float | None:
        """How many times as fast as torchvision a provider is."""
        return self._ratio(self.torchvision(), provider)

    def _ratio(self, peer: Timing | None, provider: str) -> float | None:
        timing = self.timings.get(provider)
        return peer.time.median / timing.time.median if peer and timing else None


@dataclass(frozen=True)
class Run:
    """Where, when and at which commit a section was measured."""

    date: str  # ISO 8601, UTC
    commit: str  # with "-dirty" where the work tree had changes
    device: str
    threads: int  # of the CPU
    versions: dict[str, str]
    copy_gb_s: float  # bytes read and written by a large copy
    matrix_tflop_s: dict[str, float]  # a large matrix product, by dtype
    quick: bool
    driver: str | None = None
    unavailable: dict[str, str] = field(default_factory=dict)  # peers that cannot be imported, and why

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def versioned(self) -> bool:
        """Whether it was measured in a checkout: a copy without its history has no commit."""
        return self.commit[0] in "0123456789abcdef"


@dataclass(frozen=True)
class Section:
    """The cases of one `bench_<section>.py`."""

    run: Run
    cases: list[Case]


Results = dict[str, Section]  # by section


def providers_of(cases: Iterable[Case]) -> list[str]:
    """The providers of all cases: torchvision first, and fastmask last, so that plots draw it on top."""
    names = {provider for case in cases for provider in case.timings}
    return sorted(names, key=lambda name: (is_fastmask(name), name not in TORCHVISION, name))


def slug(device: str) -> str:
    """The name of a device's file: nvidia-h200 for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def load(path: Path) -> Results:
    """Read a file of results.

    Raises:
        ValueError: the file has another format.
    """
    try:
        content = json.loads(path.read_text())
        return {
            name: Section(Run(**section["run"]), [_case(**case) for case in section["cases"]])
            for name, section in content.items()
        }
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected results of `python -m benchmarks run`, got {error!r}") from error


def save(results: Results, path: Path) -> None:
    """Write a file of results. Each case is a line, so that a diff shows which have changed."""
    sections = []
    for name in sorted(results):
        cases = ",\n".join(f"   {json.dumps(_brief(asdict(case)))}" for case in results[name].cases)
        run = json.dumps(_brief(asdict(results[name].run)))
        sections.append(f' {json.dumps(name)}: {{\n  "run": {run},\n  "cases": [\n{cases}\n  ]\n }}')
    path.parent.mkdir(parents=True, exist_ok=True)
    complete = path.with_suffix(".partial")  # a run may be killed while it writes
    complete.write_text("{\n" + ",\n".join(sections) + "\n}\n")
    complete.replace(path)


def _brief(value: Any) -> Any:
    """The value without absent entries and with five digits, since the sixth is noise."""
    if isinstance(value, dict):
        return {key: _brief(entry) for key, entry in value.items() if entry is not None and entry != {}}
    if isinstance(value, list):
        return [_brief(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _case(timings: dict[str, dict[str, Any]], **content: Any) -> Case:
    return Case(timings={provider: _timing(**timing) for provider, timing in timings.items()}, **content)


def _timing(**content: Any) -> Timing:
    fields: dict[str, Any] = {
        name: Spread(**value) if isinstance(value, dict) else value for name, value in content.items()
    }
    return Timing(**fields)
