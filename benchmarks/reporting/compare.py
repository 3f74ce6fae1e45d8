"""`python -m benchmarks compare BEFORE.json AFTER.json`: what got faster or slower, beyond the noise.

Two runs on one GPU are compared by fastmask's times. Runs on CPUs, or on different devices, are compared by the ratio
of fastmask's time to torchvision's in the same run. Cases without torchvision are compared by time if the device is the
same, and are left out otherwise. A change counts if the ranges from p20 to p80, of three rounds or more, do not
overlap. A ratio's range goes from fastmask's p20 over torchvision's p80 to fastmask's p80 over torchvision's p20.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reporting.results import Case, Results, Section, Spread, is_fastmask, load

MIN_ROUNDS = 3  # fewer do not show the noise


@dataclass(frozen=True)
class Change:
    """One form of fastmask in one case; `before` and `after` are milliseconds, or multiples of torchvision's time."""

    name: str
    unit: str
    before: Spread
    after: Spread
    rounds: int  # of the run that has fewer

    @property
    def slowdown(self) -> float:
        """Above 1: slower than before."""
        return self.after.median / self.before.median

    @property
    def beyond_noise(self) -> bool:
        apart = self.after.p20 > self.before.p80 or self.after.p80 < self.before.p20
        return apart and self.rounds >= MIN_ROUNDS

    def __str__(self) -> str:
        how = f"{self.slowdown:.2f} times the time" if self.slowdown > 1 else f"{1 / self.slowdown:.2f} times as fast"
        return f"{self.name}: {how} ({self.before.median:.4g} to {self.after.median:.4g} {self.unit})"


def same_gpu(before: Section, after: Section) -> bool:
    return before.run.on_gpu and before.run.device == after.run.device


def changes(before: Results, after: Results) -> Iterator[Change]:
    """The changes of all cases that are in both."""
    for section in before.keys() & after.keys():
        old, new = before[section], after[section]
        cases = {case.name: case for case in new.cases}
        for case in old.cases:
            if case.name in cases:
                yield from _of_case(section, case, cases[case.name], old, new)


def _of_case(section: str, old: Case, new: Case, before: Section, after: Section) -> Iterator[Change]:
    for provider in old.timings.keys() & new.timings.keys():
        name = f"{section}: {old.name}, {provider}"
        if not is_fastmask(provider):
            continue
        rounds = min(old.timings[provider].rounds, new.timings[provider].rounds)
        relative = _relative(old, provider), _relative(new, provider)
        if not same_gpu(before, after) and relative[0] and relative[1]:
            yield Change(name, "of torchvision's time", relative[0], relative[1], rounds)
        elif before.run.device == after.run.device:
            yield Change(name, "ms", old.timings[provider].time, new.timings[provider].time, rounds)


def _relative(case: Case, provider: str) -> Spread | None:
    """The provider's time over torchvision's; None where torchvision did not run."""
    peer, time = case.torchvision(), case.timings[provider].time
    if peer is None:
        return None
    return Spread(time.p20 / peer.time.p80, time.median / peer.time.median, time.p80 / peer.time.p20)


def only_in(results: Results, other: Results) -> list[str]:
    """Cases and forms of fastmask that only the first has."""
    return sorted(_fastmask(results) - _fastmask(other))


def _fastmask(results: Results) -> set[str]:
    return {
        f"{name}: {case.name}, {provider}"
        for name, section in results.items()
        for case in section.cases
        for provider in case.timings
        if is_fastmask(provider)
    }


def warnings(before: Results, after: Results) -> list[str]:
    """Differences that limit how far two runs can be compared."""
    sections: dict[str, list[str]] = {}  # by warning
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name].run, after[name].run
        differences = [
            f"{package} {old.versions.get(package)} and {new.versions.get(package)}"
            for package in ("torch", "torchvision", "triton")
            if old.versions.get(package) != new.versions.get(package)
        ]
        if old.quick != new.quick:
            differences.append("A QUICK RUN AND A FULL ONE")
        if old.device != new.device:
            differences.append(
                f"DIFFERENT DEVICES, {old.device} and {new.device}: compared in torchvision's time alone"
            )
        for line in differences:
            sections.setdefault(line, []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in sections.items()]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, help="JSON of `run`")
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="a slowdown by more than this fraction is a regression"
    )


def main(arguments: argparse.Namespace) -> int:
    """Returns 1 if fastmask got slower by more than the threshold, 2 if there is nothing to compare."""
    try:
        before, after = load(arguments.before), load(arguments.after)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    compared = sorted(changes(before, after), key=lambda change: (-change.slowdown, change.name))
    beyond = [change for change in compared if change.beyond_noise]
    regressions = [change for change in beyond if change.slowdown > 1 + arguments.threshold]
    for warning in warnings(before, after):
        print(f"! {warning}")
    for change in beyond:
        print(f"{'REGRESSION ' if change in regressions else ''}{change}")
    for path, lost in ((arguments.before, only_in(before, after)), (arguments.after, only_in(after, before))):
        for name in lost:
            print(f"only in {path}: {name}")
    print(
        f"{len(compared)} compared, {len(compared) - len(beyond)} within the noise, "
        f"{len(regressions)} slower by more than {arguments.threshold:.0%}"
    )
    if not compared:
        return 2
    return int(bool(regressions))
