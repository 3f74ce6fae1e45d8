"""python -m benchmarks run | report | compare"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, report
from benchmarks.results import FOLDER, load, slug

SECTIONS = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


class Progress:
    """A pytest plugin: a bar instead of the terminal's report, with failures written above it."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=len(session.items), unit="case")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.bar.set_description_str(nodeid.rpartition("bench_")[2])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.bar.write(f"{report.nodeid}, {report.when}\n{report.longreprtext}")
        if report.when == "teardown":
            self.bar.update()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longreprtext, file=sys.stderr)

    def pytest_unconfigure(self) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few small cases, to see that everything runs")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section; may be repeated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/<device>.json, quick: -quick.json")


def run(arguments: argparse.Namespace) -> int:
    """Everything in the sections, or what is left of them, through pytest."""
    device = torch.cuda.get_device_name() if torch.device(arguments.device).type == "cuda" else arguments.device
    path = arguments.results or FOLDER / f"{slug(device)}{'-quick' * arguments.quick}.json"
    if path.exists():
        try:
            load(path)  # what is in it stays, but for the sections that run
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    files = [str(Path(__file__).with_name(f"bench_{section}.py")) for section in arguments.only or SECTIONS]
    options = [f"--device={arguments.device}", f"--threads={arguments.threads}", f"--results={path}"]
    options += ["--quick"] * arguments.quick
    if importlib.util.find_spec("tqdm"):
        code = pytest.main([*files, *options, "-p", "no:terminal"], [Progress()])
    else:
        code = pytest.main([*files, *options])
    print(f"{path}: `python -m benchmarks report {path}` makes tables and plots of it")
    return int(code)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time everything, say how it compares.")
    commands = parser.add_subparsers(required=True)
    for name, adds_options, function, help in (
        ("run", configure, run, "measure, into a JSON file"),
        ("report", report.configure, report.main, "tables and plots of measurements"),
        ("compare", compare.configure, compare.main, "what got faster or slower between two runs"),
    ):
        command = commands.add_parser(name, help=help, description=help)
        adds_options(command)
        command.set_defaults(function=function)
    arguments = parser.parse_args()
    return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
