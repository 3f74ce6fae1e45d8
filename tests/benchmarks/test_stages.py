"""Where a detector's time goes: stages exclude one another and sum to the whole, and nothing stays wrapped."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import stages
from benchmarks.harness.stages import (
    BACKBONE,
    BACKWARD,
    HEADS,
    OPTIMIZER,
    PASTE,
    POOLING,
    SELECTION,
    Place,
    mark,
    measure,
)
from models.stage_times import OTHER, STAGES
from tests.oracles import detections, detectors

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]


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
