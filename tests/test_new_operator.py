"""A new operator is three files, one export line and one section of documentation.

A toy operator is added to a copy of the project; everything that iterates over the operators finds its declaration.
"""

import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.harness.operators import ROOT

pytestmark = pytest.mark.reference_only

KERNEL = '''
"""output = input * factor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._runtime import ceil_div, float64_bits, float_of, jit, on_device_of, overridable, register, tl
from fastmask.kernels._validation import check_float, check_tensor


class ScaleSpec(NamedTuple):
    factor: float


@jit()
def _toy_scale_kernel(input, output, size, factor_bits, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(input + index, mask=index < size)
    tl.store(output + index, value * float_of(factor_bits, tl.float32), mask=index < size)


def _launch_toy_scale(input: Tensor, spec: ScaleSpec) -> Tensor:
    output = torch.empty_like(input)
    with on_device_of(input):
        _toy_scale_kernel[(ceil_div(input.numel(), 512),)](
            input, output, input.numel(), float64_bits(spec.factor), BLOCK=512
        )
    return output


_toy_scale = register(
    "toy_scale(Tensor input, *spec) -> Tensor",
    reference=lambda input, spec: input * spec.factor,
    launch=_launch_toy_scale,
    fake=lambda input, spec: torch.empty_like(input),
    backward=lambda ctx, grad: (grad * ctx.factor,),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1].factor),
    spec=ScaleSpec,
)


@overridable
def toy_scale(input: Tensor, factor: float = 2.0) -> Tensor:
    """The input times a factor.

    Args:
        input: any shape, float32.
        factor: a number.

    Returns:
        A tensor like `input`.

    Raises:
        TypeError: `input` is no dense floating tensor, or `factor` no number.
    """
    check_tensor("input", input, floating=True)
    return _toy_scale(input, *ScaleSpec(check_float("factor", factor)))
'''

BENCHMARK = '''
"""The declaration of toy_scale."""

import torch

import fastmask
from benchmarks.harness.operators import Call, Draw, Limit, Operator, meta


def calls(device: str, seed: int) -> list[Call]:
    input = torch.rand(9, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()
    return [Call(fastmask.toy_scale, {"input": input, "factor": 3.0})]


def check_random(draw: Draw, device: str) -> None:
    factor = draw.number(-9, 9)
    assert fastmask.toy_scale(torch.ones(draw.integer(1, 9), device=device), factor).sub(factor).abs().max() < 1e-5


OPERATOR = Operator(
    calls=calls,
    compile_cases={"a million": lambda: Call(fastmask.toy_scale, {"input": meta(1 << 20)})},
    limits={"_toy_scale_kernel": {"cuda": Limit(32, wide_loads=True, wide_stores=True), "hip": Limit(32)}},
    check_random=check_random,
)
'''

TEST = """
def test_nothing():
    pass
"""

COMPILE = """
from benchmarks.harness.operators import operators
from benchmarks.reporting.compile_report import measure, violations

declared = {"toy_scale": operators()["toy_scale"]}
rows = measure("sm_90", declared)
print([row.kernel for row in rows], violations(rows, declared))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with the toy operator in it."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("fastmask", "models", "benchmarks", "tests", "docs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "fastmask/kernels/toy_scale.py").write_text(KERNEL)
    (root / "benchmarks/bench_toy_scale.py").write_text(BENCHMARK)
    (root / "tests/test_toy_scale.py").write_text(TEST)
    package = root / "fastmask/__init__.py"
    text = package.read_text() + "\nfrom fastmask.kernels.toy_scale import toy_scale\n"
    package.write_text(text + '__all__ = sorted([*__all__, "toy_scale"])\n')
    with (root / "docs/operators.md").open("a") as file:
        file.write("\n## toy_scale\n\nThe input times a factor.\n")
    return root


def run(copy, *command):
    """The output of a Python command in the copy."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    return done.stdout + done.stderr


def test_the_tests_find_a_new_operator(copy):
    files = [f"tests/test_{name}.py" for name in ("package", "arguments", "properties", "gpu")]
    selected = "toy_scale or every_operator or every_public or exports or triton"
    output = run(copy, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q", *files, "-k", selected)
    for test in (
        "test_package.py::test_every_operator_has_its_files",
        "test_package.py::test_every_public_function_is_declared",
        "test_package.py::test_exports_are_sorted_and_exist",
        "test_package.py::test_the_references_need_no_triton",
        "test_package.py::test_docstrings_explain_every_argument[toy_scale-toy_scale]",
        "test_package.py::test_a_default_device_changes_nothing[cpu-toy_scale]",
        "test_arguments.py::test_operators_name_the_wrong_argument[toy_scale]",
        "test_properties.py::test_random_cases_agree_with_an_oracle[cpu-toy_scale]",
    ):
        assert f"PASSED tests/{test}" in output, output
    assert "tests/test_gpu.py" in output  # passed, or skipped without a GPU
    assert "failed" not in output


def test_the_compile_report_finds_a_new_operator(copy):
    assert run(copy, "-c", COMPILE).strip().endswith("['_toy_scale_kernel'] []")
