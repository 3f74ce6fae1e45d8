"""The harness of the benchmarks: nobody is timed who disagrees, and nothing that was measured is lost."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from triton import testing

from benchmarks.harness.comparison import Race, close
from benchmarks.harness.machine import Machine, spread
from benchmarks.harness.workloads import STRIDES, candidates, covered, disjoint, objects, sized
from benchmarks.reporting import results
from benchmarks.reporting.results import Spread
from fastmask import box_ops as box_ops

pytestmark = pytest.mark.reference_only


class Benchmark:
    """As much of pytest-benchmark's fixture as a race asks for; the fixture itself does nothing under pytest-xdist."""

    disabled = False

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[0.002] * rounds))


@pytest.fixture(scope="module")
def machine():
    machine = Machine("cpu", torch.get_num_threads())
    assert machine.copy_gb_s > 0.1
    assert all(rate > 0 for rate in machine.matrix_tflop_s.values())
    return machine


@pytest.fixture
def cases(machine):
    machine.copy_gb_s, machine.matrix_tflop_s = 10.0, {"float32": 0.1, "bfloat16": 0.2}
    return []


@pytest.fixture
def race(machine, cases):
    return Race(Benchmark(), machine, cases.append, quick=True)


def test_a_case_is_everyone_who_ran_and_why_others_did_not(race, cases):
    calls = []

    def fails():
        raise NotImplementedError("no such dtype\nstack trace")

    race(
        "case",
        {"fastmask": lambda: calls.append("ours"), "torchvision": lambda: calls.append("theirs"), "mmcv": fails},
        lambda ours, theirs: ours == theirs,
        bytes=10**9,
        flops=2 * 10**9,
        rate="bfloat16",
        target={"cpu": 2, "gpu": 3},
        missing={"detectron2": "not installed"},
        axis="boxes",
        at=5,
    )
    (case,) = cases
    assert case.missing == {"detectron2": "not installed", "mmcv": "NotImplementedError: no such dtype"}
    assert case.timings["fastmask"].latency == Spread(2.0, 2.0, 2.0)
    assert case.timings.keys() == {"fastmask", "torchvision"}
    assert case.timings["torchvision"].rounds == case.timings["fastmask"].rounds > 1
    assert case.floor_ms == pytest.approx(100)  # 1 GB at 10 GB/s; the arithmetic would take 10 ms
    assert (case.target, case.axis, case.at) == (2, "boxes", 5)
    rounds = calls[4:]  # after the check and the call that says how long they take
    assert rounds == ["theirs", "ours"] * case.timings["fastmask"].rounds  # they take turns


def test_whoever_disagrees_is_not_timed(race, cases):
    ours, theirs = torch.ones(3), torch.tensor([1, 1, 1.1])
    disagreeing = {"fastmask": lambda: ours, "mmcv": lambda: theirs}
    for provider in ("torchvision", "fastmask bf16"):
        with pytest.raises(AssertionError, match=f"case: {provider}'s result is not ours"):
            race("case", disagreeing | {provider: lambda: theirs}, close(0.01))
    with pytest.raises(AssertionError, match="case: nobody's result is ours"):
        race("case", disagreeing, close(0.01))
    assert not cases
    race("case", disagreeing | {"torchvision": lambda: ours}, close(0.01))
    race("case", disagreeing, close(0.1))
    assert [case.missing for case in cases] == [{"mmcv": "its result is not ours"}, {}]


def test_our_own_errors_are_not_excused(race):
    def fails():
        raise RuntimeError("ours")

    for providers in ({"fastmask": fails}, {"fastmask": lambda: 1, "fastmask bf16": fails}):
        with pytest.raises(RuntimeError, match="ours"):
            race("case", providers, close(0))


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])])
def test_nothing_is_close_to_what_is_not_finite(wrong):
    assert not close(1e9)(wrong, torch.ones(2))
    assert not close(1e9)((torch.ones(2), wrong), (torch.ones(2), torch.ones(2)))


def test_spread():
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Spread(2.0, 3.5, 5.0)


def test_the_floor_is_the_slower_of_memory_and_arithmetic(machine, cases):
    assert not cases
    assert machine.floor_ms(bytes=10**9, flops=0, dtype="float32") == pytest.approx(100)
    assert machine.floor_ms(bytes=0, flops=10**10, dtype="float32") == pytest.approx(100)


class Event:
    """A device's clock on which every call takes 4 ms."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.filterwarnings("ignore:called a synchronizing")
@pytest.mark.parametrize("waiting", [False, True])
def test_what_a_gpu_tells(monkeypatch, machine, waiting):
    def call():
        Event.now += 4.0
        if waiting:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    modes = []
    for name, value in {
        "Event": Event,
        "synchronize": lambda: None,
        "set_sync_debug_mode": modes.append,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 3 * 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=64))
    monkeypatch.setattr(torch, "empty", lambda size, **_: torch.ones(size))
    monkeypatch.setattr(testing, "do_bench_cudagraph", lambda *_, rep, quantiles: [rep * q for q in quantiles])
    monkeypatch.setattr(machine, "on_gpu", True)

    timing = machine.time(call, [6.0, 5.0, 7.0], events=True, capture=True)
    assert timing.time == timing.cold == timing.warm == Spread(4.0, 4.0, 4.0)
    assert timing.latency.median == 6.0
    assert timing.waits == waiting
    assert (timing.graph is None) == waiting  # what waits cannot be captured
    assert timing.peak_mib == 2
    assert modes == ["warn", "default"]
    assert machine.time(call, [6.0], events=True, capture=False).graph is None
    whole = machine.time(call, [6.0], events=False, capture=False)
    assert (whole.cold, whole.warm, whole.graph, whole.time.median) == (None, None, None, 6.0)


def test_a_section_is_written_case_by_case(tmp_path):
    path = tmp_path / "cpu.json"
    options = ["--quick", f"--results={path}", "--device=cpu", "-k", "one_list"]
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_nms.py", *options]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not xdist's worker
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    assert run.returncode == 0, run.stdout
    first = results.load(path)["nms"]
    assert first.run.quick
    assert first.run.device == "cpu"
    assert [case.name for case in first.cases] == [
        "1,000 boxes, float32",
        "1,000 boxes, float16",
        "1,000 boxes, bfloat16",
    ]
    assert first.cases[0].ratio() > 0
    assert "torchvision autocast" in first.cases[1].timings


# The model of boxes.


def test_objects_have_cocos_sizes():
    box = objects(20_000)
    scale = 640 / 1333
    side = (box[:, 2:] - box[:, :2]).prod(1).sqrt() * scale
    assert (side < 32).double().mean() == pytest.approx(0.41, abs=0.02)
    assert (side >= 96).double().mean() == pytest.approx(0.24, abs=0.02)
    assert (box >= 0).all()
    assert (box <= torch.tensor([1344, 800, 1344, 800])).all()


def test_candidates_crowd_and_adversaries_are_what_they_are_called():
    boxes, scores = candidates(1000)
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    assert ((scores > 0) & (scores < 1)).all()
    assert scores.median() < 0.2
    crowd = (box_ops.iou(boxes, boxes) > 0.7).sum(1) - 1
    assert 0.3 < (crowd > 0).double().mean() < 0.9
    grid = disjoint(100)
    assert (box_ops.iou(grid, grid).fill_diagonal_(0) == 0).all()
    assert ((sized(10, 790)[:, 2:] - sized(10, 790)[:, :2] - 790).abs() < 1e-3).all()


def test_covered_pixels_are_counted_once():
    boxes = torch.tensor([[0.0, 0, 8, 8], [4, 4, 12, 12], [0, 0, 448, 448]])
    shapes = [(200, 336), (100, 168), (50, 84), (25, 42)]
    touched = torch.zeros(200, 336, dtype=torch.bool)
    for x1, y1, x2, y2 in (boxes[:2] / 4).int().tolist():
        touched[y1 : y2 + 2, x1 : x2 + 2] = True
    assert covered([boxes], shapes, STRIDES) == int(touched.sum()) + 16 * 16
