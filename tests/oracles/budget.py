"""The error budgets of operators against float64."""

import torch

# The largest error allowed against float64, relative to the sum of the magnitudes of the terms of an element.
# float16 and bfloat16 round twice by half of `finfo.eps`: the result, and in a backward the weights of the matrix
# product. A tenth of that is left for the float32 sum.
BUDGET = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.1 * 2**-10, torch.bfloat16: 1.1 * 2**-7}


def assert_within_budget(actual, exact, magnitude, dtype=None):
    """`|actual - exact| <= budget * magnitude`, elementwise; `magnitude` is float64 like `exact`."""
    error = (actual.detach().double().cpu() - exact).abs()
    allowed = BUDGET[dtype or actual.dtype] * magnitude.abs() + 1e-300
    worst = (error / allowed).nan_to_num(nan=torch.inf).max().item() if error.numel() else 0.0
    assert worst <= 1, f"error is {worst:.3g} times the budget for {dtype or actual.dtype}"
