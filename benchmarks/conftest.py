"""Options and fixtures of `pytest benchmarks/`."""

from pathlib import Path

import pytest
import torch

from benchmarks.harness.comparison import Comparison
from benchmarks.harness.machine import Machine
from benchmarks.reporting import results
from benchmarks.reporting.results import Case, Section


def pytest_addoption(parser):
    group = parser.getgroup("fastmask", "fastmask's benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--threads", type=int, help="of the CPU; default: as many as PyTorch likes")
    group.addoption("--quick", action="store_true", help="few small cases, few rounds: a test that everything runs")
    group.addoption("--results", type=Path, help="JSON file in which the sections that run are replaced")


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # peers may warn
    if config.option.quick:
        left_out = [item for item in items if not item.get_closest_marker("quick")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def machine(request):
    return Machine(request.config.option.device, request.config.option.threads)


@pytest.fixture(scope="module")
def record(request, machine):
    """Adds a case to this section and writes the file, so that an interrupted run keeps what it has measured."""
    option = request.config.option
    name = request.module.__name__.rpartition("bench_")[2]
    section = Section(machine.run(quick=option.quick), [])

    def add(case: Case) -> None:
        assert case.name not in [other.name for other in section.cases]  # `compare` finds cases by their names
        section.cases.append(case)
        if option.results:
            others = results.load(option.results) if option.results.exists() else {}
            results.save(others | {name: section}, option.results)

    return add


@pytest.fixture
def comparison(request, benchmark, machine, record):
    torch.manual_seed(0)
    return Comparison(benchmark, machine, record, quick=request.config.option.quick)
