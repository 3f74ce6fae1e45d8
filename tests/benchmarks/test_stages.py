"""Where a detector's time goes: stages exclude one another and sum to the whole, and nothing stays wrapped."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import detectors, stages
from benchmarks.harness.stages import (
    BACKBONE,
    BACKWARD,
    HEADS,
    NMS,
    OPTIMIZER,
    OTHER,
    POOLING,
    STAGES,
    Stopwatch,
    measure,
)

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to: `clock(seconds)`."""
    now = [0.0]

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return wait


def test_the_innermost_stage_gets_the_time(clock):
    watch = Stopwatch("cpu")
    with watch.stage(OTHER):
        clock(1)
        with watch.stage(HEADS):
            clock(2)
            with watch.stage(NMS):
                clock(4)
            clock(8)
            with watch.stage(HEADS):  # a stage may run inside itself
                clock(16)
        clock(32)
    clock(64)
    spent = watch.milliseconds()
    assert spent == {HEADS: 26e3, NMS: 4e3, OTHER: 33e3}
    assert list(spent) == [stage for stage in STAGES if stage in spent]


def test_functions_are_wrapped_for_one_measurement(clock):
    def inner():
        clock(2)

    owner = SimpleNamespace(inner=inner, outer=lambda: (clock(1), owner.inner(), clock(4)))
    before = vars(owner).copy()
    places = [(owner, "outer", BACKBONE), (owner, "inner", POOLING)]
    for _ in range(2):
        spent = measure(lambda: (clock(8), owner.outer(), owner.inner()), places, "cpu")
        assert spent == {BACKBONE: 5e3, POOLING: 4e3, OTHER: 8e3}
    assert vars(owner) == before


def test_an_exception_passes_and_unwraps(clock):
    def fail():
        clock(1)
        raise KeyError("image")

    owner, module = SimpleNamespace(fail=fail), torch.nn.Identity()
    with pytest.raises(KeyError, match="image"):
        measure(lambda: owner.fail(), [(owner, "fail", HEADS), (module, "forward", BACKBONE)], "cpu")
    assert owner.fail is fail
    assert "forward" not in vars(module)


def test_a_stage_that_fails_is_left(clock):
    watch = Stopwatch("cpu")

    @watch.stage(NMS)
    def fail():
        clock(1)
        raise KeyError("image")

    with watch.stage(OTHER):
        with pytest.raises(KeyError, match="image"):
            fail()
        clock(2)
    assert watch.milliseconds() == {NMS: 1e3, OTHER: 2e3}


def test_both_detectors_pass_through_the_same_stages():
    size = (320, 320)
    theirs = detectors.torchvisions("R-18-FPN", size)
    ours, images = detectors.ours(theirs), [detectors.picture(*size)]
    spent = measure(lambda: detectors.detect(ours, images), stages.of_ours(ours), "cpu")
    others = measure(lambda: detectors.detect_torchvisions(theirs, images), stages.of_torchvisions(theirs), "cpu")
    assert list(spent) == list(others) == [stage for stage in STAGES if stage not in (BACKWARD, OPTIMIZER)]
    assert all(milliseconds > 0 for milliseconds in (*spent.values(), *others.values()))
