"""The error budgets of operators, by dtype."""

import torch

# Largest error allowed against float64, relative to the sum of the magnitudes that an element is made of.
# float16 and bfloat16 round twice (the result, and in a backward the weights of the matrix product) by half a
# step of `finfo.eps`; a tenth of that is left for the float32 sum.
BUDGET = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.1 * 2**-10, torch.bfloat16: 1.1 * 2**-7}


def assert_within_budget(actual, exact, magnitude, dtype=None):
    """`|actual - exact| <= budget * magnitude`, elementwise; `magnitude` is float64 like `exact`."""
    error = (actual.detach().double().cpu() - exact).abs()
    allowed = BUDGET[dtype or actual.dtype] * magnitude.abs() + 1e-300
    worst = (error / allowed).nan_to_num(nan=torch.inf).max().item() if error.numel() else 0.0
    assert worst <= 1, f"error is {worst:.3g} times the budget for {dtype or actual.dtype}"
