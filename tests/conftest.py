"""What all operator tests share: the devices, uninitialised memory poisoned, and the error budgets."""

import pytest
import torch

from fastmask.kernels._runtime import INTERPRETED

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and not INTERPRETED else [])]

# Largest error allowed against float64, relative to the sum of the magnitudes that an element is made of.
# float16 and bfloat16 round twice (the result, and in a backward the weights of the matrix product) by half a
# step of `finfo.eps`; a tenth of that is left for the float32 sum.
BUDGET = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.1 * 2**-10, torch.bfloat16: 1.1 * 2**-7}


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
    """Fill what `torch.empty` returns with NaN (integers: their largest), so an unwritten element shows.

    PyTorch does so where deterministic algorithms are asked for, and then warns of operators that have none.
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_within_budget(actual, exact, magnitude, dtype=None):
    """`|actual - exact| <= budget * magnitude`, elementwise; `magnitude` is float64 like `exact`."""
    error = (actual.detach().double().cpu() - exact).abs()
    allowed = BUDGET[dtype or actual.dtype] * magnitude.abs() + 1e-300
    worst = (error / allowed).nan_to_num(nan=torch.inf).max().item() if error.numel() else 0.0
    assert worst <= 1, f"error is {worst:.3g} times the budget for {dtype or actual.dtype}"
