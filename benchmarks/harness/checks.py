"""The check that providers agree: each runs once, and all are checked before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.harness.timing import Implementation, Timer
from benchmarks.reporting.results import FASTMASK, is_fastmask

Same = Callable[[Any, Any], bool]  # whether fastmask's result and another provider's agree

DISAGREES = "its result differs from fastmask's"


def parameters(rows: Iterable[tuple], quick: Callable[..., bool]) -> list[Any]:
    """Rows of `pytest.mark.parametrize`; those for which `quick(*row)` is true are marked as quick."""
    return [pytest.param(*row, marks=[pytest.mark.quick] if quick(*row) else []) for row in rows]


def close(tolerance: float) -> Same:
    """A check that tensors, or tuples of them, differ by at most `tolerance` times the largest magnitude."""

    def same(result: Any, expected: Any) -> bool:
        pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
        return all((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max() for a, b in pairs)

    return same


@dataclass(frozen=True)
class Checked:
    """The providers that agree with fastmask, and those that are missing."""

    calls: dict[str, Implementation]  # by provider
    missing: dict[str, str]  # by provider: why it did not run or does not agree
    milliseconds: float  # that the first calls of all providers took together


def check(
    name: str, providers: Mapping[str, Implementation], same: Same, missing: Mapping[str, str], timer: Timer
) -> Checked:
    """Run each provider of a case once and compare its result with fastmask's.

    torchvision in float32 and all forms of fastmask have to agree. Other providers are missing if they disagree, since
    their versions vary and round differently, or if they raise a RuntimeError. At least one provider has to agree.

    Args:
        name: the case's name.
        providers: by name, `FASTMASK` among them.
        same: called with fastmask's result and another provider's.
        missing: providers that are known to be missing, and why.
        timer: the device's timer.

    Raises:
        AssertionError: torchvision or a form of fastmask disagrees, or every provider does.
    """
    start = time.perf_counter()
    expected = timer.finish(providers[FASTMASK])
    calls, absent = {FASTMASK: providers[FASTMASK]}, dict(missing)
    for provider, call in providers.items():
        if provider == FASTMASK:
            continue
        try:
            result = timer.finish(call)
        except RuntimeError as error:  # no such dtype, no memory, no compiler
            if is_fastmask(provider):
                raise
            absent[provider] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if same(expected, result):
            calls[provider] = call
            continue
        may_differ = provider != "torchvision" and not is_fastmask(provider)
        assert may_differ, f"{name}: {provider}'s result differs from fastmask's, nothing was timed"
        absent[provider] = DISAGREES
    assert len(calls) > 1 or DISAGREES not in absent.values(), (
        f"{name}: every result differs from fastmask's, nothing was timed"
    )
    return Checked(calls, absent, (time.perf_counter() - start) * 1e3)
