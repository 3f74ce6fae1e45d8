"""Where a detector's time goes: stages exclude one another and sum to the whole, and nothing stays wrapped."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from benchmarks.harness import stages
from benchmarks.harness.stages import (
    BACKBONE,
    BACKWARD,
    HEADS,
    OPTIMIZER,
    OTHER,
    PASTE,
    POOLING,
    SELECTION,
    STAGES,
    Activity,
    Mark,
    Place,
    exclusive,
    mark,
    measure,
)
from tests.oracles import detections, detectors

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]


def test_the_innermost_mark_gets_the_time():
    marks = [
        Mark(0, 63, OTHER),
        Mark(1, 31, HEADS),
        Mark(3, 7, SELECTION),
        Mark(15, 31, HEADS),  # a stage may run inside itself
        Mark(40, 40, POOLING),  # an empty mark
    ]
    spent = exclusive(reversed(marks))
    assert spent == {HEADS: 26, SELECTION: 4, OTHER: 33, POOLING: 0}
    assert sum(spent.values()) == 63


def test_marks_that_follow_each_other_are_apart():
    assert exclusive([Mark(0, 9, OTHER), Mark(1, 4, BACKBONE), Mark(4, 6, POOLING)]) == {
        OTHER: 4,
        BACKBONE: 3,
        POOLING: 2,
    }


def test_a_devices_stage_ends_when_its_work_is_done():
    """The host marks two stages in 4 ns each; their kernels take 20 and 10, and the host works on for 5 at the end."""
    marks = [Mark(100, 150, OTHER), Mark(101, 105, BACKBONE), Mark(105, 109, HEADS), Mark(145, 149, SELECTION)]
    work = [Activity(launch=106, end=133), Activity(launch=102, end=123), Activity(launch=103, end=122)]
    spent = exclusive(marks, work)
    assert spent[BACKBONE] == 22  # the host reaches it at 101, and the device is done with it at 123
    assert spent[HEADS] == 10
    assert spent[SELECTION] == 4  # no work of the device, so the host's time
    assert spent[OTHER] == 1 + (145 - 133) + 1
    assert sum(spent.values()) == 50


class Event:
    """An event of PyTorch's profiler."""

    def __init__(self, name, start, end, device=DeviceType.CPU, *, annotation=False, id=0, launched_by=0):
        self.name = lambda: name
        self.start_ns = lambda: start
        self.end_ns = lambda: end
        self.device_type = lambda: device
        self.is_user_annotation = lambda: annotation
        self.correlation_id = lambda: id
        self.linked_correlation_id = lambda: launched_by


def test_marks_and_the_devices_work_are_read_from_a_profile():
    gpu = DeviceType.CUDA
    events = [
        Event("fastmask::selection", 10, 20, annotation=True, id=1),
        Event("fastmask::selection", 12, 99, gpu, annotation=True, id=1),  # the device's range of the mark
        Event("fastmask::nms_padded", 11, 15, id=2),  # an operator
        Event("cudaLaunchKernel", 13, 14, id=3, launched_by=2),
        Event("_scan_kernel", 30, 90, gpu, id=3, launched_by=2),
        Event("Memset (Device)", 91, 95, gpu, id=4),  # launched outside of all operators
        Event("other::selection", 10, 20, annotation=True, id=5),
    ]
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    marks, work = stages._read(profiler)
    assert marks == [Mark(10, 20, SELECTION)]
    assert work == [Activity(launch=11, end=90), Activity(launch=91, end=95)]


def expect_the_whole(call, places, expected):
    """Measure a call whose stages are `expected`: each takes time, and their sum is the time of the call."""
    seconds = []

    def timed():
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)

    spent = measure(timed, "cpu", places)
    assert list(spent) == expected
    assert all(milliseconds > 0 for milliseconds in spent.values())
    assert sum(spent.values()) == pytest.approx(1e3 * seconds[0], rel=0.02)
    return spent


def test_a_profile_has_every_mark_with_its_time():
    def call():
        with mark(HEADS):
            time.sleep(0.1)
            with mark(SELECTION):
                torch.ones(4).sum()
                time.sleep(0.2)
        time.sleep(0.05)

    spent = expect_the_whole(call, [], [stage for stage in STAGES if stage in (HEADS, SELECTION, OTHER)])
    assert all(spent[stage] >= least for stage, least in ((HEADS, 100), (SELECTION, 200), (OTHER, 50)))


def test_functions_are_wrapped_for_one_measurement():
    def inner():
        time.sleep(0.002)

    owner = SimpleNamespace(inner=inner, outer=lambda: owner.inner())
    before = vars(owner).copy()
    places = [Place(owner, "outer", BACKBONE), Place(owner, "inner", POOLING)]
    for _ in range(2):
        spent = measure(lambda: (owner.outer(), owner.inner()), "cpu", places)
        assert list(spent) == [BACKBONE, POOLING, OTHER]
        assert spent[POOLING] >= 4
    assert vars(owner) == before


def test_an_exception_passes_and_unwraps():
    def fail():
        raise KeyError("image")

    owner, module = SimpleNamespace(fail=fail), torch.nn.Identity()
    places = [Place(owner, "fail", HEADS), Place(module, "forward", BACKBONE)]
    with pytest.raises(KeyError, match="image"):
        measure(lambda: owner.fail(), "cpu", places)
    assert owner.fail is fail
    assert "forward" not in vars(module)


def test_a_stage_that_fails_is_left():
    def call():
        with pytest.raises(KeyError, match="image"), mark(SELECTION):
            raise KeyError("image")
        time.sleep(0.005)

    spent = measure(call, "cpu")
    assert list(spent) == [SELECTION, OTHER]
    assert spent[OTHER] >= 5


@pytest.fixture(scope="module")
def peer():
    return detectors.torchvision_detector("R-18-FPN", (320, 320))


INFERENCE = [stage for stage in STAGES if stage not in (BACKWARD, OPTIMIZER)]


def test_torchvisions_stages_sum_to_the_whole(peer):
    images = [detectors.textured_image(320, 320)]
    places = stages.of_torchvision(peer)
    expect_the_whole(lambda: detections.detect_torchvision(peer, images), places, INFERENCE)


def test_fastmasks_stages_sum_to_the_whole(peer):
    model, images = detectors.fastmask_detector(peer), [detectors.textured_image(320, 320)]
    expect_the_whole(lambda: detections.detect(model, images), [], [stage for stage in INFERENCE if stage != PASTE])
