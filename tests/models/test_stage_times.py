"""Times of stages from the marks of a profile: stages exclude one another and sum to the whole."""

from types import SimpleNamespace

import pytest
from torch._C._autograd import DeviceType

from models import stage_times
from models.stage_times import OTHER, Activity, Mark, exclusive

pytestmark = pytest.mark.reference_only


def test_the_innermost_mark_gets_the_time():
    marks = [
        Mark(0, 63, OTHER),
        Mark(1, 31, "heads"),
        Mark(3, 7, "selection"),
        Mark(15, 31, "heads"),  # a stage may run inside itself
        Mark(40, 40, "pooling"),  # an empty mark
    ]
    spent = exclusive(reversed(marks))
    assert spent == {"heads": 26, "selection": 4, OTHER: 33, "pooling": 0}
    assert sum(spent.values()) == 63


def test_marks_that_follow_each_other_are_apart():
    assert exclusive([Mark(0, 9, OTHER), Mark(1, 4, "backbone"), Mark(4, 6, "pooling")]) == {
        OTHER: 4,
        "backbone": 3,
        "pooling": 2,
    }


def test_a_devices_stage_ends_when_its_work_is_done():
    """The host marks two stages in 4 ns each; their kernels take 20 and 10, and the host works on for 5 at the end."""
    marks = [Mark(100, 150, OTHER), Mark(101, 105, "backbone"), Mark(105, 109, "heads"), Mark(145, 149, "selection")]
    work = [Activity(launch=106, end=133), Activity(launch=102, end=123), Activity(launch=103, end=122)]
    spent = exclusive(marks, work)
    assert spent["backbone"] == 22  # the host reaches it at 101, and the device is done with it at 123
    assert spent["heads"] == 10
    assert spent["selection"] == 4  # no work of the device, so the host's time
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
    marks, work = stage_times._read(profiler)
    assert marks == [Mark(10, 20, "selection")]
    assert work == [Activity(launch=11, end=90), Activity(launch=91, end=95)]
