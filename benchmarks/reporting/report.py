"""`python -m benchmarks report`: results as Markdown and plots.

Each `<device>.json` gets a folder `<device>/` beside it. Committed results also fill the README's tables, which stand
between the comments `<!-- <device>.json -->` and `<!-- end -->`. Everything is made from the JSON alone: the same
results give the same bytes. docs/compile_report.md is rewritten as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from benchmarks.reporting import plots
from benchmarks.reporting.results import FASTMASK, FOLDER, Case, Results, Run, load
from benchmarks.reporting.tables import end_to_end, is_end_to_end, missing, number, operator, ratios, table

README = Path(__file__).parents[2] / "README.md"


def document(file: str, results: Results) -> str:
    """The report of `file`, with its plots."""
    runs = [section.run for section in results.values()]
    devices = ", ".join(dict.fromkeys(run.device for run in runs))
    parts = [
        f"# {devices}",
        f"Written by `python -m benchmarks report` from [{file}](../{file}). What each figure means and how it is "
        "measured: [docs/benchmarks.md](../../../docs/benchmarks.md). What the kernels compile to: "
        "[docs/compile_report.md](../../../docs/compile_report.md).",
    ]
    if any(run.quick for run in runs):
        parts.append("**A quick run: few cases and few rounds. It shows that everything works, not how fast it is.**")
    parts += [provenance(results), summary(results)]
    for name, section in sorted(results.items(), key=lambda item: not is_end_to_end(item[1])):
        parts.append(f"## {name}")
        parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots.planned(name, section)]
        parts += end_to_end(name, section) if is_end_to_end(section) else operator(section)
        parts.append(missing(section))
    return "\n\n".join(part for part in parts if part) + "\n"


def provenance(results: Results) -> str:
    """Where, when and at which commit each section was measured."""
    rows = [
        {
            "section": name,
            "measured, UTC": run.date[:16].replace("T", " "),
            "commit": f"`{run.commit[:10]}{'-dirty' * run.commit.endswith('-dirty')}`" if run.versioned else "unknown",
            "copy, GB/s": number(run.copy_gb_s),
            **{f"{dtype} product, TFLOP/s": number(rate) for dtype, rate in run.matrix_tflop_s.items()},
        }
        for name, run in ((name, section.run) for name, section in results.items())
    ]
    machines: dict[str, list[str]] = {}
    for name, section in results.items():
        machines.setdefault(_machine(section.run), []).append(name)
    if len(machines) == 1:
        return "\n\n".join([*machines, table(rows)])
    return "\n\n".join([*(f"{', '.join(names)}: {machine}" for machine, names in machines.items()), table(rows)])


def _machine(run: Run) -> str:
    driver = [f"driver {run.driver}"] if run.driver else []
    versions = [f"{name} {version}" for name, version in run.versions.items()]
    absent = [f"{name} is missing: {why}" for name, why in run.unavailable.items()]
    return "; ".join([", ".join([run.device, f"{run.threads} CPU threads", *driver, *versions]), *absent]) + "."


def _compared(results: Results) -> list[tuple[str, Case, float]]:
    """Each case that torchvision ran too, with its section and its ratio."""
    return [
        (name, case, ratio)
        for name, section in results.items()
        for case in section.cases
        if (ratio := case.ratio()) is not None
    ]


def summary(results: Results) -> str:
    """How many cases are faster, and every one that is not."""
    compared = _compared(results)
    if not compared:
        return ""
    faster = sum(ratio >= 1 for *_, ratio in compared)
    verdicts = [case.meets_target for _, case, _ in compared if case.target]
    line = f"fastmask is as fast as torchvision or faster in {faster} of {len(compared)} cases"
    line += f", and meets {sum(map(bool, verdicts))} of {len(verdicts)} targets." if verdicts else "."
    losses = [
        {"": f"{name}: {case.name}", "against": peer, "times as fast": number(ratio)}
        for name, section in results.items()
        for case in section.cases
        for peer, ratio in ratios(case).items()
        if ratio < 1
    ]
    missed = [
        {"": f"{name}: {case.name}", "times as fast": number(ratio), "target": number(case.target)}
        for name, case, ratio in compared
        if case.target and not case.meets_target
    ]
    parts = ["## Summary", line]
    parts += ["Slower than a peer:", table(losses)] if losses else []
    parts += ["Below its target:", table(missed)] if missed else []
    return "\n\n".join(parts)


def readme_table(file: str, results: Results) -> str:
    """The cases that have a target, and all others that torchvision runs faster."""
    compared = _compared(results)
    rows = [
        {
            "": f"{name}: {case.name}",
            "microseconds": number(1e3 * case.timings[FASTMASK].time.median) if results[name].run.on_gpu else "",
            "times as fast as torchvision": number(ratio),
            "target": number(case.target) if case.target else "",
            " ": ("met" if case.meets_target else "missed") if case.target else "slower",
        }
        for name, case, ratio in compared
        if case.target or ratio < 1
    ]
    faster = sum(ratio >= 1 for *_, ratio in compared)
    report = f"benchmarks/results/{Path(file).stem}/report.md"
    total = f"Of all {len(compared)} cases {faster} are as fast as torchvision or faster: [{report}]({report})."
    return "\n\n".join(filter(None, [table(rows), total]))


def shown(readme: str) -> list[str]:
    """The files whose table the README shows."""
    return re.findall(r"^<!-- (\S+\.json) -->$", readme, re.MULTILINE)


def renewed(readme: str, file: str, content: str) -> str:
    """The README with `content` between the file's comments."""
    place = re.compile(rf"(<!-- {re.escape(file)} -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda match: f"{match[1]}{content}\n{match[2]}", readme)


def write(path: Path) -> list[Path]:
    """Write the folder of one file, and its table in the README if it is shown there; returns what was written."""
    results = load(path)
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    written = [folder / "report.md"]
    written[0].write_text(document(path.name, results))
    if importlib.util.find_spec("matplotlib"):
        for name, section in results.items():
            for plot, draw in plots.planned(name, section).items():
                plots.save(draw, folder / plot)
                written.append(folder / plot)
    readme = README.read_text()
    if path.resolve().parent == FOLDER.resolve() and path.name in shown(readme):
        README.write_text(renewed(readme, path.name, readme_table(path.name, results)))
        written.append(README)
    return written


def write_compile_report() -> int:
    """Rewrite docs/compile_report.md, which needs Triton but no GPU. Returns 1 if a kernel exceeds a limit."""
    if importlib.util.find_spec("triton") is None:
        print("Triton is missing: docs/compile_report.md is not rewritten", file=sys.stderr)
        return 0
    from benchmarks.reporting import compile_report

    return compile_report.main()


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="*", type=Path, help="JSON files; default: all of benchmarks/results")
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="do not rewrite docs/compile_report.md; compiling takes minutes the first time",
    )


def main(arguments: argparse.Namespace) -> int:
    """Returns 1 if a kernel exceeds a limit of the compile report, 2 if a file cannot be read."""
    try:
        for path in arguments.results or sorted(FOLDER.glob("*.json")):
            for written in write(path):
                print(written)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is missing: no plots were drawn", file=sys.stderr)
    return write_compile_report() if arguments.compile else 0
