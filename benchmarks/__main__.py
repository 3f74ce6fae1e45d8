"""python -m benchmarks run | report | compare"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.reporting import compare, report
from benchmarks.reporting.results import FOLDER, load, slug

ROOT = Path(__file__).parents[1]
WHOLE = ("model", "training")  # after the operators that they are made of
SECTIONS = sorted(
    (path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")),
    key=lambda section: (section in WHOLE, section),
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few small cases, to see that everything runs")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section; may be repeated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: 2 to measure it, all beside a GPU")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/<device>.json, quick: -quick.json")


def run(arguments: argparse.Namespace) -> int:
    """Each section in a process of its own: what breaks one breaks no other. 1 if a case failed."""
    on_gpu = torch.device(arguments.device).type != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    path = arguments.results or FOLDER / f"{slug(device)}{'-quick' * arguments.quick}.json"
    if path.exists():
        try:
            load(path)  # what is in it stays, but for the sections that run
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    options = [f"--device={arguments.device}", f"--results={path.resolve()}", *["--quick"] * arguments.quick]
    if threads := arguments.threads or (None if on_gpu else 2):
        options.append(f"--threads={threads}")
    if importlib.util.find_spec("tqdm"):
        options += ["-p", "no:terminal", "-p", "benchmarks.harness.progress"]
    failed = []
    for section in arguments.only or SECTIONS:
        command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{section}.py", *options]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(section)
    print(f"{path}: `python -m benchmarks report {path}` makes tables and plots of it")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


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
