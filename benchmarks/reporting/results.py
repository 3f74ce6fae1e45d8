"""What a run of the suite leaves behind: `benchmarks/results/<device>.json`, read by `report` and `compare`.

A file has sections, one of each `bench_<section>.py`, and each says for itself when, where and of which commit it was
measured: a run that was cut off goes on with the sections that it lacks. Times are milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parents[1] / "results"

OURS = "fastmask"
TORCHVISION = ("torchvision", "torchvision autocast")  # the peer that ratios and targets are of, whichever ran

Kind = Literal["paper", "adversarial", "scaling"]


def is_ours(provider: str) -> bool:
    """Ours in some form: "fastmask", "fastmask bf16"."""
    return provider.startswith(OURS)


@dataclass(frozen=True)
class Spread:
    """Quantiles over the rounds."""

    p20: float
    median: float
    p80: float


@dataclass(frozen=True)
class Timing:
    """One provider of one case. What only a GPU can tell is None on a CPU."""

    latency: Spread  # from the call until the device is done, by the host's clock
    rounds: int
    cold: Spread | None = None  # device events, L2 flushed before each call
    warm: Spread | None = None  # device events, L2 as the call before left it
    graph: Spread | None = None  # replays of a CUDA graph, None where it cannot be captured
    waits: int | None = None  # how often a call waits for the device
    peak_mib: float | None = None  # allocated at most, beyond the inputs

    @property
    def time(self) -> Spread:
        """What ratios are made of: the device's time on a GPU, the clock's on a CPU."""
        return self.cold or self.latency


@dataclass(frozen=True)
class Case:
    """One workload and everyone who ran it."""

    name: str
    kind: Kind
    timings: dict[str, Timing]  # by provider, OURS among them
    missing: dict[str, str] = field(default_factory=dict)  # provider: why it has no timing
    bytes: int | None = None  # that have to move: each input read once, each output written once
    flops: int | None = None  # operations, a multiply-add being two
    floor_ms: float | None = None  # of the two, at the rates measured in this run
    target: float | None = None  # at least so many times as fast as torchvision
    axis: str | None = None  # scaling: what grows
    at: float | None = None  # scaling: to which number
    images: int | None = None  # end to end: in a batch
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # provider: stage: milliseconds

    @property
    def model(self) -> str:
        """End to end: the preset's name, with which the case's begins."""
        return self.name.split(",")[0]

    def peer(self) -> Timing | None:
        """torchvision's timing."""
        return next((self.timings[name] for name in TORCHVISION if name in self.timings), None)

    def ratio(self, provider: str = OURS) -> float | None:
        """How many times as fast as torchvision a provider is."""
        peer, own = self.peer(), self.timings.get(provider)
        return peer.time.median / own.time.median if peer and own else None


@dataclass(frozen=True)
class Run:
    """Where, when and of what a section was measured."""

    date: str  # ISO 8601, UTC
    commit: str  # with "-dirty" where the work tree had changes
    device: str
    threads: int  # of the CPU
    versions: dict[str, str]
    copy_gb_s: float  # bytes read and written by a large copy
    matrix_tflop_s: dict[str, float]  # a large matrix product, by dtype
    quick: bool
    driver: str | None = None
    unavailable: dict[str, str] = field(default_factory=dict)  # peers that cannot be imported here: why

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def versioned(self) -> bool:
        """Whether it was measured in a checkout; what is copied without its history has no commit."""
        return self.commit[0] in "0123456789abcdef"


@dataclass(frozen=True)
class Section:
    run: Run
    cases: list[Case]


Results = dict[str, Section]  # by section


def who_ran(cases: Iterable[Case]) -> list[str]:
    """Every provider of some case: torchvision first, ours last and so on top in a plot."""
    names = {provider for case in cases for provider in case.timings}
    return sorted(names, key=lambda name: (is_ours(name), name not in TORCHVISION, name))


def slug(device: str) -> str:
    """A device's name as a file's: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def load(path: Path) -> Results:
    """Raises a ValueError that names the file if it is not of this format."""
    try:
        content = json.loads(path.read_text())
        return {
            name: Section(Run(**section["run"]), [_case(case) for case in section["cases"]])
            for name, section in content.items()
        }
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected results of `python -m benchmarks run`, got {error!r}") from error


def save(results: Results, path: Path) -> None:
    """Each case is a line, so that a diff shows which have changed."""
    sections = []
    for name in sorted(results):
        cases = ",\n".join(f"   {json.dumps(_brief(asdict(case)))}" for case in results[name].cases)
        run = json.dumps(_brief(asdict(results[name].run)))
        sections.append(f' {json.dumps(name)}: {{\n  "run": {run},\n  "cases": [\n{cases}\n  ]\n }}')
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".partial")  # a run may be killed while it writes
    whole.write_text("{\n" + ",\n".join(sections) + "\n}\n")
    whole.replace(path)


def _brief(value: Any) -> Any:
    """Without what is absent, and to five digits: noise begins before the sixth."""
    if isinstance(value, dict):
        return {key: _brief(entry) for key, entry in value.items() if entry is not None and entry != {}}
    if isinstance(value, list):
        return [_brief(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _case(content: dict[str, Any]) -> Case:
    timings = {
        provider: Timing(**{name: Spread(**v) if isinstance(v, dict) else v for name, v in timing.items()})
        for provider, timing in content["timings"].items()
    }
    return Case(**content | {"timings": timings})
