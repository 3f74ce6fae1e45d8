"""The commands `python -m benchmarks run | report | compare | compile | launches | host-time`."""

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
WHOLE = ("loader", "model", "training")  # run after the operators
SECTIONS = sorted(
    (path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")),
    key=lambda section: (section in WHOLE, section),
)


def configure_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few small cases: a test that everything runs")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="run this section; may be repeated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; default: 2 on a CPU, all on a GPU")
    parser.add_argument(
        "--results", type=Path, help="default: benchmarks/results/<device>.json, with --quick <device>-quick.json"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run each section in a process of its own, so that a crash affects no other section.

    Returns:
        1 if a case failed, 2 if the results cannot be read.
    """
    on_gpu = torch.device(arguments.device).type != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    path = arguments.results or FOLDER / f"{slug(device)}{'-quick' * arguments.quick}.json"
    if path.exists():
        try:
            load(path)  # sections that do not run now are kept
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
    print(f"{path}: `python -m benchmarks report {path}` makes its tables and plots")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def no_options(_: argparse.ArgumentParser) -> None:
    """For commands that take none."""


def _has_triton(command: str) -> bool:
    """Whether Triton is installed; says so if it is not."""
    if importlib.util.find_spec("triton"):
        return True
    print(f"{command}: expected Triton to be installed", file=sys.stderr)
    return False


def compile_kernels(_: argparse.Namespace) -> int:
    """Rewrite docs/compile_report.md. Returns 1 if a kernel exceeds a limit, 2 without Triton."""
    if not _has_triton("compile"):
        return 2
    from benchmarks.reporting import compile_report

    return compile_report.main()


def configure_host_time(parser: argparse.ArgumentParser) -> None:
    choices = [section for section in SECTIONS if section not in WHOLE]
    parser.add_argument("--only", action="append", choices=choices, help="measure this operator; may be repeated")


def host_time(arguments: argparse.Namespace) -> int:
    """Print the host time of launchers. Returns 2 without Triton."""
    if not _has_triton("host-time"):
        return 2
    from benchmarks.reporting import host_time

    return host_time.main(arguments.only)


def launches(_: argparse.Namespace) -> int:
    """Rewrite benchmarks/results/launches.md. Returns 2 without Triton."""
    if not _has_triton("launches"):
        return 2
    from benchmarks.reporting import launches as table

    return table.main()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure fastmask and compare it.")
    commands = parser.add_subparsers(required=True)
    for name, configure, function, help in (
        ("run", configure_run, run, "measure and write the results to a JSON file"),
        ("report", report.configure, report.main, "write tables and plots of results"),
        ("compare", compare.configure, compare.main, "say what got faster or slower between two runs"),
        ("compile", no_options, compile_kernels, "compile all kernels, without a GPU, and check their limits"),
        ("launches", no_options, launches, "count the launches of a detector by stage, without a GPU"),
        ("host-time", configure_host_time, host_time, "measure what launching costs on the host, without a GPU"),
    ):
        command = commands.add_parser(name, help=help, description=help)
        configure(command)
        command.set_defaults(function=function)
    arguments = parser.parse_args()
    return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
