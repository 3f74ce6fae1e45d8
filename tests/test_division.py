"""Division by constants and by reciprocals: the kernels' formulas give the correctly rounded quotient."""

from types import SimpleNamespace

import pytest
import torch

from fastmask.kernels import _runtime


def fma(x, y, z):
    """float32, rounded once. The product of two float32 is exact in float64; the tests' sums are no midpoints there."""
    x, y, z = (
        value.double() if isinstance(value, torch.Tensor) else torch.tensor(value).double() for value in (x, y, z)
    )
    return (x * y + z).float()


@pytest.fixture
def formulas(monkeypatch):
    """The functions that kernels call, on tensors."""
    monkeypatch.setattr(_runtime, "tl", SimpleNamespace(float64=torch.float64, fma=fma))
    monkeypatch.setattr(_runtime, "_FMA_ROUNDS_TWICE", False)
    return SimpleNamespace(by_constant=_runtime.divide_by_constant.fn, by_reciprocal=_runtime.divide_by_reciprocal.fn)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 6, 7, 9, 14, 28, 63, 97, 255, 1000, 65535, 2**22 - 1])
def test_every_mantissa_is_divided_by_a_constant(divisor, formulas):
    x = torch.arange(1 << 23, dtype=torch.int32).add(0x3F800000).view(torch.float32)  # [1, 2)
    assert torch.equal(formulas.by_constant(x, divisor), x / divisor)


@pytest.mark.parametrize("exponent", [-60, -1, 23, 126])
@pytest.mark.parametrize("divisor", [3, 7, 14, 2**22 - 1])
def test_small_and_large_numbers_are_divided_by_a_constant(divisor, exponent, formulas):
    x = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)).add(1) * 2.0**exponent
    x = torch.cat([x, -x, torch.zeros(1), torch.full((1,), torch.finfo(torch.float32).max)])
    assert torch.equal(formulas.by_constant(x, divisor), x / divisor)
    assert formulas.by_constant(torch.tensor([torch.nan]), divisor).isnan().all()


@pytest.mark.parametrize("divisor", [1, 2, 64, 2**22])
def test_powers_of_two_divide_every_number(divisor, formulas):
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=torch.Generator().manual_seed(divisor))
    x = bits.to(torch.int32).view(torch.float32)  # denormal and infinite ones too
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -3e-45])])
    actual, expected = formulas.by_constant(x, divisor), x / divisor
    assert torch.equal(actual.view(torch.int32)[~x.isnan()], expected.view(torch.int32)[~x.isnan()])
    assert actual[x.isnan()].isnan().all()


@pytest.mark.parametrize("largest", [8, 300, 2**22, 2**24, 2.0**100])
def test_numbers_are_divided_by_numbers(largest, formulas):
    g = torch.Generator().manual_seed(1)
    divisor = torch.rand(1 << 20, generator=g).mul(largest).ceil().clamp(min=1)
    x = torch.randn(1 << 20, generator=g).mul(largest).where(torch.arange(1 << 20) % 7 != 0, divisor / 2 * 3)
    x = x.where(x.abs() >= 2.0**-60, 0.0)
    assert torch.equal(formulas.by_reciprocal(x, divisor, 1 / divisor), x / divisor)
