"""Fixtures of the operator tests: the devices, and poisoned uninitialised memory."""

import os

import pytest
import torch

from fastmask.kernels._runtime import INTERPRETED

# With pytest-xdist: as many threads in all workers, and in the processes that they start, as in one process. OpenMP's
# threads spin while they wait, so two workers of two threads on two cores take longer than two workers of one.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and not INTERPRETED else [])]


def pytest_collection_modifyitems(config, items):
    if INTERPRETED:
        left_out = [item for item in items if item.get_closest_marker("reference_only")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Fill what `torch.empty` returns with NaN, or the largest integer, so that an unwritten element shows.

    PyTorch does this when deterministic algorithms are enabled. It then also warns of operators without one.
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
