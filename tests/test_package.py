"""The package: its exports and docstrings, the files of every operator, default devices, a machine without Triton."""

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
    for call, actual in zip(calls, results, strict=True):
        expected = call.run()
        assert len(expected) > 0
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), call.function


def test_exports_are_sorted_and_exist():
    assert fastmask.__all__ == sorted(fastmask.__all__)
    assert all(hasattr(fastmask, name) for name in fastmask.__all__)
    assert fastmask.__version__


def public_functions():
    return {function for name in fastmask.__all__ if inspect.isfunction(function := getattr(fastmask, name))}


def lacking(name, declared, root=ROOT):
    """What an operator lacks of its kernel, test, benchmark, documentation and exports, all named after it."""
    kernels = root / "fastmask" / "kernels"
    present = {
        f"fastmask/kernels/{name}": (kernels / f"{name}.py").exists() or (kernels / name / "__init__.py").exists(),
        f"tests/test_{name}.py": (root / "tests" / f"test_{name}.py").exists(),
        f"benchmarks/bench_{name}.py": name in declared,
        f"a section of docs/operators.md, ## {name}": f"\n## {name}\n" in (root / "docs" / "operators.md").read_text(),
    }
    missing = [what for what, there in present.items() if not there]
    functions = {call.function for call in declared[name].calls("cpu", 0)} if name in declared else set()
    missing += [f"an export of {function.__name__}" for function in functions - public_functions()]
    elsewhere = [function for function in functions if function.__module__ != f"fastmask.kernels.{name}"]
    return missing + [f"{function.__name__} in fastmask.kernels.{name}" for function in elsewhere]


def test_every_operator_has_its_files():
    declared = operators()
    files = {path.stem for path in (ROOT / "fastmask" / "kernels").iterdir() if not path.name.startswith("_")}
    assert {name: missing for name in files | declared.keys() if (missing := lacking(name, declared))} == {}


def test_what_an_operator_lacks_is_named(tmp_path, monkeypatch):
    declared = operators()
    name = next(iter(declared))
    content = {f"fastmask/kernels/{name}.py": "", f"tests/test_{name}.py": "", "docs/operators.md": f"\n## {name}\n"}
    for path, text in content.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    assert lacking(name, declared, tmp_path) == []
    for path, message in zip(content, (f"fastmask/kernels/{name}", f"tests/test_{name}.py"), strict=False):
        (tmp_path / path).unlink()
        assert lacking(name, declared, tmp_path) == [message]
        (tmp_path / path).touch()
    (tmp_path / "docs/operators.md").write_text("")
    assert lacking(name, declared, tmp_path) == [f"a section of docs/operators.md, ## {name}"]
    assert lacking(name, {}) == [f"benchmarks/bench_{name}.py"]
    functions = {call.function.__name__ for call in declared[name].calls("cpu", 0)}
    monkeypatch.setattr(fastmask, "__all__", [])
    assert set(lacking(name, declared)) == {f"an export of {function}" for function in functions}


def test_every_public_function_is_declared():
    declared = {call.function for operator in operators().values() for call in operator.calls("cpu", 0)}
    of_tensors = {
        function
        for function in public_functions()
        if any("Tensor" in str(parameter.annotation) for parameter in inspect.signature(function).parameters.values())
    }
    assert len(of_tensors) > 10
    assert of_tensors <= declared


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
            actual = elsewhere.run()
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), plain.function
