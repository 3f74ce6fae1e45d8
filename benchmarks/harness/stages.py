"""Where a detector's time goes, by stage.

A stage is a range that the code marks with `torch.profiler.record_function("fastmask::<stage>")`. fastmask's detector
marks its stages itself. A peer has no marks: its functions are wrapped in the same marks while it is measured. The time
between two boundaries of marks belongs to the innermost mark there, so stages exclude one another and sum to the whole
call.

On a CPU the boundaries are those of the host's clock. On a GPU each is moved to when the device reaches it: when the
device has finished everything that the host launched before. A GPU's stage thus includes the gaps in which the device
is idle, and work that autograd launches from a thread of its own, during which the host's mark stays open.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import accumulate
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torchvision.models.detection import transform

from benchmarks.harness.timing import Implementation
from models.marks import PREFIX
from models.marks import STAGES as MODEL_STAGES

PREPROCESS, BACKBONE, FPN, RPN, POOLING, HEADS, SELECTION, PASTE, RLE, BACKWARD, OPTIMIZER = MODEL_STAGES
OTHER = "other"  # outside of all marks
STAGES = (*MODEL_STAGES, OTHER)


class Place(NamedTuple):
    """A function of a peer, as an attribute of its owner, and the stage that a call of it is."""

    owner: object
    attribute: str
    stage: str


class Mark(NamedTuple):
    """A marked range; nanoseconds of the host's clock."""

    start: int
    end: int
    stage: str


class Activity(NamedTuple):
    """A kernel or a copy on the device; nanoseconds."""

    launch: int  # by the host
    end: int


def mark(stage: str) -> record_function:
    """The mark of a stage, for what the benchmarks add to a detector."""
    return record_function(PREFIX + stage)


def measure(call: Implementation, device: str, places: Sequence[Place] = ()) -> dict[str, float]:
    """Milliseconds of each stage that ran, in the order of `STAGES`: of one call on a CPU, medians of three on a GPU.

    Args:
        call: what is measured; its time outside of all marks is the stage "other".
        device: "cpu" or "cuda".
        places: functions that are wrapped in marks while the call is measured.
    """
    with marked(places):
        runs = [_measure(call, device) for _ in range(1 if device == "cpu" else 3)]
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}


def measures(
    calls: Mapping[str, Implementation], device: str, places: Mapping[str, Sequence[Place]]
) -> dict[str, Callable[[], dict[str, float]]]:
    """The argument `stages` of a comparison: a function for each call that has an entry in `places`."""
    return {name: partial(measure, call, device, places[name]) for name, call in calls.items() if name in places}


@contextmanager
def marked(places: Iterable[Place]) -> Iterator[None]:
    """Wrap functions in the marks of their stages."""
    with ExitStack() as patches:
        for owner, attribute, stage in places:
            wrapped = _marked(getattr(owner, attribute), stage)
            patches.enter_context(patch.object(owner, attribute, wrapped))
        yield


def _marked(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with mark(stage):
            return function(*args, **kwargs)

    return run


def _measure(call: Implementation, device: str) -> dict[str, float]:
    on_gpu = torch.device(device).type != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # Without acc_events, PyTorch warns that it drops the events of earlier cycles, although there are none.
    with profile(activities=activities, acc_events=True) as profiler, mark(OTHER):
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


def of_torchvision(model: Any) -> list[Place]:
    """The functions of a torchvision detector that are its stages."""
    roi_heads = model.roi_heads
    poolers = [roi_heads.box_roi_pool, roi_heads.mask_roi_pool, roi_heads.keypoint_roi_pool]
    return [
        Place(model.transform, "forward", PREPROCESS),
        Place(model.backbone.body, "forward", BACKBONE),
        Place(model.backbone.fpn, "forward", FPN),
        Place(model.rpn, "forward", RPN),
        *(Place(pooler, "forward", POOLING) for pooler in poolers if pooler is not None),
        Place(roi_heads, "forward", HEADS),
        Place(model.rpn, "filter_proposals", SELECTION),
        Place(roi_heads, "postprocess_detections", SELECTION),
        Place(transform, "paste_masks_in_image", PASTE),
    ]
