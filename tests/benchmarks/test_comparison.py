"""Comparisons: a provider that disagrees is not timed, and nothing that was measured is lost."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness.checks import close
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.machine import Machine
from benchmarks.reporting import results
from benchmarks.reporting.results import Spread

pytestmark = pytest.mark.reference_only


class Benchmark:
    """The part of pytest-benchmark's fixture that a comparison uses; the fixture does nothing under pytest-xdist."""

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
def comparison(machine, cases):
    return Comparison(Benchmark(), machine, cases.append, quick=True)


def test_a_case_has_the_providers_that_ran_and_why_others_did_not(comparison, cases):
    calls = []

    def fails():
        raise NotImplementedError("no such dtype\nstack trace")

    comparison.run(
        "case",
        {
            "fastmask": lambda: calls.append("fastmask"),
            "torchvision": lambda: calls.append("torchvision"),
            "mmcv": fails,
        },
        lambda result, expected: result == expected,
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
    assert rounds == ["torchvision", "fastmask"] * case.timings["fastmask"].rounds  # they take turns


def test_a_provider_that_disagrees_is_not_timed(comparison, cases):
    right, wrong = torch.ones(3), torch.tensor([1, 1, 1.1])
    disagreeing = {"fastmask": lambda: right, "mmcv": lambda: wrong}
    for provider in ("torchvision", "fastmask bf16"):
        with pytest.raises(AssertionError, match=f"case: {provider}'s result differs from fastmask's"):
            comparison.run("case", disagreeing | {provider: lambda: wrong}, close(0.01))
    with pytest.raises(AssertionError, match="case: every result differs from fastmask's"):
        comparison.run("case", disagreeing, close(0.01))
    assert not cases
    comparison.run("case", disagreeing | {"torchvision": lambda: right}, close(0.01))
    comparison.run("case", disagreeing, close(0.1))
    assert [case.missing for case in cases] == [{"mmcv": "its result differs from fastmask's"}, {}]


def test_errors_of_fastmask_are_raised(comparison):
    def fails():
        raise RuntimeError("fastmask")

    for providers in ({"fastmask": fails}, {"fastmask": lambda: 1, "fastmask bf16": fails}):
        with pytest.raises(RuntimeError, match="fastmask"):
            comparison.run("case", providers, close(0))


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])])
def test_nothing_is_close_to_non_finite_values(wrong):
    assert not close(1e9)(wrong, torch.ones(2))
    assert not close(1e9)((torch.ones(2), wrong), (torch.ones(2), torch.ones(2)))


def test_the_floor_is_the_slower_of_memory_and_arithmetic(machine, cases):
    assert not cases
    assert machine.floor_ms(bytes=10**9, flops=0, dtype="float32") == pytest.approx(100)
    assert machine.floor_ms(bytes=0, flops=10**10, dtype="float32") == pytest.approx(100)


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
