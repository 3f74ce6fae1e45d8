"""Where a call's time goes, by the stages that `models.marks` marks.

The time between two boundaries of marks belongs to the innermost mark there, so stages exclude one another and sum to
the whole call.

On a CPU the boundaries are those of the host's clock. On a GPU each is moved to when the device reaches it: when the
device has finished everything that the host launched before. A GPU's stage thus includes the gaps in which the device
is idle, and work that autograd launches from a thread of its own, during which the host's mark stays open.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from models.marks import PREFIX
from models.marks import STAGES as MARKED

OTHER = "other"  # outside of all marks
STAGES = (*MARKED, OTHER)


class Mark(NamedTuple):
    """A marked range; nanoseconds of the host's clock."""

    start: int
    end: int
    stage: str


class Activity(NamedTuple):
    """A kernel or a copy on the device; nanoseconds."""

    launch: int  # by the host
    end: int


def stage_times(call: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of each stage that ran, in the order of `STAGES`: of one call on a CPU, medians of three on a GPU.

    Args:
        call: what is measured; its time outside of all marks is the stage "other".
        device: "cpu" or "cuda".
    """
    runs = [_measure(call, device) for _ in range(1 if device == "cpu" else 3)]
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}


def _measure(call: Callable[[], object], device: str) -> dict[str, float]:
    on_gpu = torch.device(device).type != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # Without acc_events, PyTorch warns that it drops the events of earlier cycles, although there are none.
    with profile(activities=activities, acc_events=True) as profiler, record_function(PREFIX + OTHER):
        call()
        if on_gpu:
            torch.cuda.synchronize()
    marks, work = _read(profiler)
    spent = exclusive(marks, work)
    return {stage: spent[stage] / 1e6 for stage in sorted(spent, key=_order)}


def _order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _read(profiler: profile) -> tuple[list[Mark], list[Activity]]:
    """The marks of a profile, and the work of the device.

    It reads the profiler's raw events. Their conversion to public events takes longer than the call, and public events
    do not say which operator launched a kernel.
    """
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    on_host = [event for event in events if event.device_type() == DeviceType.CPU]
    marks = [
        Mark(event.start_ns(), event.end_ns(), event.name().removeprefix(PREFIX))
        for event in on_host
        if event.is_user_annotation() and event.name().startswith(PREFIX)
    ]
    # A kernel is linked to the operator that launched it. The operator's start stands for the time of the launch.
    operators = {event.correlation_id(): event.start_ns() for event in on_host if not event.linked_correlation_id()}
    work = [
        Activity(operators.get(event.linked_correlation_id(), event.start_ns()), event.end_ns())
        for event in events
        if event.device_type() != DeviceType.CPU and not event.is_user_annotation()
    ]
    return marks, work


def exclusive(marks: Iterable[Mark], work: Iterable[Activity] = ()) -> dict[str, int]:
    """Nanoseconds in which each stage is the innermost mark.

    Args:
        marks: nested or disjoint, all within one outermost mark.
        work: the device's activities; each boundary of a mark moves to when the device reaches it.
    """
    reached = _clock(work)
    spent: dict[str, int] = {}
    running: list[Mark] = []
    now = 0

    def advance(time: int) -> None:
        nonlocal now
        if running:
            stage = running[-1].stage
            spent[stage] = spent.get(stage, 0) + reached(time) - reached(now)
        now = time

    def leave_until(time: float) -> None:
        while running and running[-1].end <= time:
            advance(running[-1].end)
            running.pop()

    for entry in sorted(marks, key=lambda entry: (entry.start, -entry.end)):
        leave_until(entry.start)
        advance(entry.start)
        running.append(entry)
    leave_until(float("inf"))
    return spent


def _clock(work: Iterable[Activity]) -> Callable[[int], int]:
    """A function from a time of the host to when the device reaches it, all earlier launches being finished."""
    ordered = sorted(work)
    launches = [activity.launch for activity in ordered]
    finished = list(accumulate((activity.end for activity in ordered), max))

    def reached(time: int) -> int:
        before = bisect_left(launches, time)
        return max(time, finished[before - 1]) if before else time

    return reached
