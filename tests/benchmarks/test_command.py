"""`python -m benchmarks`, and importing the benchmarks without optional packages."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command

pytestmark = pytest.mark.reference_only

IMPORTS_ALL = """
import importlib, sys
for package in ("triton", "pycocotools", "matplotlib", "tqdm"):
    sys.modules[package] = None
from benchmarks import __main__ as command
for section in command.SECTIONS:
    importlib.import_module(f"benchmarks.bench_{section}")
"""


def test_benchmarks_import_without_optional_packages():
    run = subprocess.run([sys.executable, "-c", IMPORTS_ALL], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_whole_detectors_come_after_their_operators():
    assert command.SECTIONS[-3:] == ["loader", "model", "training"]
    assert command.SECTIONS[:-3] == sorted(command.SECTIONS[:-3])


@pytest.mark.parametrize("code", [0, 1])
def test_compile_renews_the_compile_report(code, monkeypatch):
    module = SimpleNamespace(main=lambda: code)
    monkeypatch.setitem(sys.modules, "benchmarks.reporting.compile_report", module)
    monkeypatch.setattr("benchmarks.reporting.compile_report", module, raising=False)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(sys, "argv", ["benchmarks", "compile"])
    assert command.main() == code


def test_compile_needs_triton(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "compile"])
    assert command.main() == 2
    assert "expected Triton to be installed" in capsys.readouterr().err
