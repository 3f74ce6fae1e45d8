"""The package: what it exports, that every operator has its files, and that all works where Triton is missing."""

import inspect
import subprocess
import sys

import pytest
import torch

import fastmask
from benchmarks.harness.operators import ROOT, operators
from fastmask import box_ops

WITHOUT_TRITON = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no Triton here")

sys.meta_path.insert(0, Hide())
import torch
from benchmarks.harness.operators import operators
from fastmask.kernels._runtime import triton

results = [call.run() for operator in operators().values() for call in operator.calls("cpu", 0)]
assert triton is None and "triton" not in sys.modules
torch.save(results, sys.argv[1])
"""


@pytest.mark.reference_only
def test_the_references_need_no_triton(tmp_path):
    path = tmp_path / "results.pt"
    command = [sys.executable, "-c", WITHOUT_TRITON, str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    calls = [call for operator in operators().values() for call in operator.calls("cpu", 0)]
    results = torch.load(path)
    assert len(results) == len(calls) > 0
    for call, got in zip(calls, results, strict=True):
        expected = call.run()
        assert len(expected) > 0
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), call.function


def test_exports_are_sorted_and_there():
    assert fastmask.__all__ == sorted(fastmask.__all__)
    assert all(hasattr(fastmask, name) for name in fastmask.__all__)
    assert fastmask.__version__


def public_functions():
    return {function for name in fastmask.__all__ if inspect.isfunction(function := getattr(fastmask, name))}


def faults(name, declared, root=ROOT):
    """What an operator lacks: its name is the address of its kernel, test, benchmark and documentation."""
    kernels = root / "fastmask" / "kernels"
    wanted = {
        f"fastmask/kernels/{name}": (kernels / f"{name}.py").exists() or (kernels / name / "__init__.py").exists(),
        f"tests/test_{name}.py": (root / "tests" / f"test_{name}.py").exists(),
        f"benchmarks/bench_{name}.py": name in declared,
        f"a section of docs/operators.md, ## {name}": f"\n## {name}\n" in (root / "docs" / "operators.md").read_text(),
    }
    missing = [what for what, there in wanted.items() if not there]
    functions = {call.function for call in declared[name].calls("cpu", 0)} if name in declared else set()
    missing += [f"an export of {function.__name__}" for function in functions - public_functions()]
    strange = [function for function in functions if function.__module__ != f"fastmask.kernels.{name}"]
    return missing + [f"{function.__name__} in fastmask.kernels.{name}" for function in strange]


def test_every_operator_has_its_files():
    declared = operators()
    files = {path.stem for path in (ROOT / "fastmask" / "kernels").iterdir() if not path.name.startswith("_")}
    assert {name: missing for name in files | declared.keys() if (missing := faults(name, declared))} == {}


def test_every_public_function_is_declared():
    declared = {call.function for operator in operators().values() for call in operator.calls("cpu", 0)}
    assert public_functions() <= declared


def documented():
    """Everything public that takes arguments, with the parameters that its docstring has to explain."""
    for name in fastmask.__all__:
        if inspect.isfunction(value := getattr(fastmask, name)) or inspect.isclass(value):
            yield name, value
    for name, value in vars(box_ops).items():
        if inspect.isfunction(value) and value.__module__ == box_ops.__name__ and not name.startswith("_"):
            yield f"box_ops.{name}", value


@pytest.mark.parametrize(("name", "value"), list(documented()))
def test_docstrings_explain_every_argument(name, value):
    text = inspect.getdoc(value)
    parts = ("Args:",) if inspect.isclass(value) else ("Args:", "Returns:", "Raises:")
    assert all(f"\n{part}" in text for part in parts), name
    arguments = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    unexplained = [parameter for parameter in inspect.signature(value).parameters if parameter not in arguments]
    assert unexplained == []


@pytest.mark.parametrize("name", operators())
def test_a_default_device_changes_nothing(name, device):
    calls = [operators()[name].calls(device, 0) for _ in range(2)]
    for plain, elsewhere in zip(*calls, strict=True):
        expected = plain.run()
        with torch.device("meta"):
            got = elsewhere.run()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), plain.function
