"""What is made of the benchmarks' results: tables, plots, the README, comparisons."""

import argparse
from dataclasses import replace

import pytest

from benchmarks.reporting import compare, plots, report
from benchmarks.reporting.results import FOLDER, OURS, Case, Run, Section, Spread, Timing, load, save
from benchmarks.reporting.tables import number, table

pytestmark = pytest.mark.reference_only

SHOWN = report.shown(report.README.read_text())


@pytest.mark.parametrize("file", SHOWN)
def test_the_readme_and_the_reports_show_the_committed_results(file):
    results, readme = load(FOLDER / file), report.README.read_text()
    command = "run `python -m benchmarks report`"
    assert readme == report.renewed(readme, file, report.readme_table(file, results)), command
    assert (FOLDER / file).with_suffix("").joinpath("report.md").read_text() == report.document(file, results), command
    assert not any(section.run.quick for section in results.values())


def test_the_readme_shows_a_cpu():
    assert "cpu.json" in SHOWN


def spread(milliseconds):
    return Spread(*(float(f"{factor * milliseconds:.5g}") for factor in (0.98, 1, 1.02)))  # as a file has them


def timing(milliseconds, *, on_gpu=True, **more):
    if not on_gpu:
        return Timing(spread(milliseconds), rounds=9)
    figures = {"cold": milliseconds, "warm": 0.8 * milliseconds, "graph": 0.7 * milliseconds}
    return Timing(
        spread(milliseconds + 0.02),
        rounds=9,
        **{name: spread(value) for name, value in figures.items()},
        **{"waits": 0, "peak_mib": 1.5} | more,
    )


def made_up(device="NVIDIA H200", **run):
    """Two operators and a detector, with a win, a loss, a missed target and missing peers."""
    on_gpu = device != "cpu"

    def timings(**milliseconds):
        return {name.replace("_", " "): timing(value, on_gpu=on_gpu) for name, value in milliseconds.items()}

    where = Run(
        date="2026-01-02T03:04:05+00:00",
        commit="0123456789abcdef-dirty",
        device=device,
        threads=2,
        versions={"torch": "2.11.0"},
        copy_gb_s=4000.0,
        matrix_tflop_s={"float32": 50.0},
        quick=False,
        driver="580.95" if on_gpu else None,
        unavailable={"detectron2": "not installed"},
    )
    pooled = [
        Case("1000 RoIs", "paper", timings(fastmask=0.02, torchvision=0.1), bytes=40_000_000, floor_ms=0.01, target=8),
        Case("10 RoIs", "scaling", timings(fastmask=0.01, torchvision=0.02), axis="RoIs", at=10),
        Case("100 RoIs", "scaling", timings(fastmask=0.02, torchvision=0.08), axis="RoIs", at=100),
    ]
    slow = Timing(spread(0.05), 9, spread(0.04), waits=3) if on_gpu else timing(0.04, on_gpu=False)
    suppressed = [
        Case("10,000 boxes", "paper", timings(fastmask=0.05) | {"torchvision": slow}),
        Case("200,000 boxes", "paper", timings(fastmask=5.0), missing={"torchvision": "out of memory"}),
    ]
    steps = {"torchvision": 40.0, OURS: 20.0, "fastmask bf16": 10.0, "fastmask bf16 graph": 8.0}
    detector = Case(
        "R-101-FPN, batch 1",
        "paper",
        {name: timing(value, on_gpu=on_gpu) for name, value in steps.items()},
        images=1,
        stages={OURS: {"backbone": 15.0, "heads": 5.0}},
    )
    sections = {"model": [detector], "nms": suppressed, "roi_align": pooled}
    return {name: Section(replace(where, **run), cases) for name, cases in sections.items()}


def test_results_survive_a_file(tmp_path):
    path = tmp_path / "made" / "gpu.json"
    save(made_up(), path)
    assert load(path) == made_up()
    assert [entry.name for entry in path.parent.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"nms": {}}', '{"nms": {"run": {"date": 1}, "cases": []}}'])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json: expected results of `python -m benchmarks run`"):
        load(path)


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (99.96, "100"), (12.345, "12.3"), (9.996, "10.0"), (0.831, "0.83")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_columns_without_entries_are_left_out():
    made = table([{"a": "x", "b": ""}, {"a": "y", "c": "**0.5**"}])
    assert made.splitlines() == ["| a | c |", "| --- | --: |", "| x |  |", "| y | **0.5** |"]


def rows(text, beginning):
    return [line for line in text.splitlines() if line.startswith(f"| {beginning} |")]


def test_a_gpu_report_says_everything():
    text = report.document("nvidia-h200.json", made_up())
    assert "NVIDIA H200, 2 CPU threads, driver 580.95, torch 2.11.0; detectron2 is missing: not installed." in text
    assert "| nms | 2026-01-02 03:04 | `0123456789-dirty` | 4,000 | 50.0 |" in text
    assert "as fast as torchvision or faster in 4 of 5 cases, and meets 0 of 1 targets." in text
    assert rows(text, "nms: 10,000 boxes") == ["| nms: 10,000 boxes | torchvision | 0.80 |"]
    assert rows(text, "roi_align: 1000 RoIs") == ["| roi_align: 1000 RoIs | 5.00 | 8.00 |"]
    against_peers, against_hardware = rows(text, "1000 RoIs")
    assert against_peers == ("| 1000 RoIs | paper | 9 | 20.0 (19.6-20.4) | 100 (98.0-102): 5.00x | 8.00, **missed** |")
    # MB, floor, times the floor, then warm, graph, latency, waits and MiB of ours and of torchvision.
    assert against_hardware == (
        "| 1000 RoIs | 40.0 | 10.0 | 2.00 | 16.0 | 14.0 | 40.0 | 0 | 1.50 | 80.0 | 70.0 | 120 | 0 | 1.50 |"
    )
    assert "40.0 (39.2-40.8): **0.80x**" in rows(text, "10,000 boxes")[0]
    assert "- torchvision (out of memory): 200,000 boxes" in text


def test_a_gpu_report_of_a_detector_says_every_step_and_what_others_published():
    text = report.document("nvidia-h200.json", made_up())
    graph = rows(text, "R-101-FPN, batch 1")[3]
    assert graph == "| R-101-FPN, batch 1 | fastmask bf16 graph | 8.00 (7.84-8.16) | 125 | 0 | 1.50 | 5.00x |"
    assert "| R-101-FPN, batch 1 | fastmask | 15.0 (75%) | 5.00 (25%) |" in text
    assert "| R-101-FPN | M40 | 210 | 4.76 | 8.00 | [He et al. 2017]" in text


def test_a_cpu_report_has_ratios_and_no_times():
    text = report.document("cpu.json", made_up("cpu"))
    assert rows(text, "1000 RoIs")[0] == "| 1000 RoIs | paper | 9 | 5.00x (4.80-5.20) | 8.00, **missed** |"
    assert "| R-101-FPN, batch 1 | fastmask | 75% | 25% |" in text
    assert not any(unit in text for unit in ("us |", "| ms", "microseconds", "images/s"))


def test_a_report_of_a_quick_run_says_so():
    assert "A quick run" in report.document("cpu.json", made_up("cpu", quick=True))
    assert "A quick run" not in report.document("cpu.json", made_up("cpu"))


def test_the_readme_shows_targets_and_losses():
    shown = report.readme_table("cpu.json", made_up("cpu"))
    assert "| roi_align: 1000 RoIs | 5.00 | 8.00 | missed |" in shown
    assert "| nms: 10,000 boxes | 0.80 |  | slower |" in shown
    assert "100 RoIs" not in shown.replace("1000 RoIs", "")
    assert "Of all 5 cases 4 are as fast as torchvision or faster" in shown
    readme = report.renewed("a\n<!-- cpu.json -->\nold\n<!-- end -->\nb\n", "cpu.json", "new")
    assert readme == "a\n<!-- cpu.json -->\nnew\n<!-- end -->\nb\n"


def test_report_writes_beside_the_file_and_into_the_readme_if_it_is_shown_there(tmp_path, monkeypatch, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "FOLDER", results)
    readme.write_text("<!-- cpu.json -->\n<!-- end -->\n")
    save(made_up("cpu"), results / "cpu.json")
    save(made_up(), results / "nvidia-h200.json")
    save(made_up(), tmp_path / "cpu.json")
    assert report.main(argparse.Namespace(results=[], compile=False)) == 0
    assert "# NVIDIA H200" in (results / "nvidia-h200" / "report.md").read_text()
    shown = readme.read_text()
    assert report.readme_table("cpu.json", made_up("cpu")) in shown
    assert report.main(argparse.Namespace(results=[tmp_path / "cpu.json"], compile=False)) == 0
    assert readme.read_text() == shown
    assert report.main(argparse.Namespace(results=[readme], compile=False)) == 2
    assert "README.md: expected results" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["NVIDIA H200", "cpu"])
def test_plots_are_drawn_and_the_same_twice(device, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    for folder in ("once", "twice"):
        save(made_up(device), tmp_path / folder / "made.json")
        drawn.append({path.name: path.read_bytes() for path in report.write(tmp_path / folder / "made.json")})
    once, twice = drawn
    assert once == twice
    text = once.pop("report.md").decode()
    assert set(once) == {
        f"{name}.svg" for name in ("roi_align_floor", "roi_align_scaling", "model_latency", "model_waterfall")
    }
    for name, content in once.items():
        assert f"({name})" in text
        assert b"<svg" in content
        assert len(content) < 100_000
    published = b"paper, M40" in once["model_latency.svg"]
    assert published == (device != "cpu")


def changed(results, section, **milliseconds):
    """The results with other times of the section's first case."""
    first, *others = results[section].cases
    on_gpu = results[section].run.on_gpu
    timings = first.timings | {name: timing(value, on_gpu=on_gpu) for name, value in milliseconds.items()}
    return results | {section: replace(results[section], cases=[replace(first, timings=timings), *others])}


def exit_code(tmp_path, before, after, *options):
    for name, results in (("before", before), ("after", after)):
        save(results, tmp_path / f"{name}.json")
    parser = argparse.ArgumentParser()
    compare.configure(parser)
    return compare.main(parser.parse_args([str(tmp_path / "before.json"), str(tmp_path / "after.json"), *options]))


@pytest.mark.parametrize(
    ("milliseconds", "code", "said"),
    [
        (0.0300, 1, "REGRESSION roi_align: 1000 RoIs, fastmask: 1.50 times the time (0.02 to 0.03 ms)"),
        (0.0214, 0, "\nroi_align: 1000 RoIs, fastmask: 1.07 times the time"),  # beyond the noise, below the threshold
        (0.0205, 0, ", 0 slower"),  # within the noise
        (0.0100, 0, "\nroi_align: 1000 RoIs, fastmask: 2.00 times as fast (0.02 to 0.01 ms)"),
    ],
)
def test_a_regression_beyond_noise_and_threshold_fails(milliseconds, code, said, tmp_path, capsys):
    assert exit_code(tmp_path, made_up(), changed(made_up(), "roi_align", fastmask=milliseconds)) == code
    assert said in "\n" + capsys.readouterr().out


def test_the_threshold_is_an_option(tmp_path):
    after = changed(made_up(), "roi_align", fastmask=0.0214)
    assert exit_code(tmp_path, made_up(), after, "--threshold", "0.05") == 1


def test_a_wide_spread_is_no_regression(tmp_path):
    after = made_up()
    noisy = Timing(spread(0.05), 9, Spread(0.0195, 0.05, 0.09))
    case = replace(after["roi_align"].cases[0], timings={OURS: noisy})
    assert exit_code(tmp_path, made_up(), after | {"roi_align": replace(after["roi_align"], cases=[case])}) == 0


def test_cpus_are_compared_by_torchvisions_time(tmp_path, capsys):
    """A machine that is twice as slow is no regression; where torchvision is missing, time is all there is."""
    slower = changed(made_up("cpu"), "roi_align", fastmask=0.04, torchvision=0.2)
    assert exit_code(tmp_path, made_up("cpu"), slower) == 0
    slower = changed(made_up("cpu"), "roi_align", fastmask=0.04)
    assert exit_code(tmp_path, made_up("cpu"), slower) == 1
    assert "(0.2 to 0.4 of torchvision's time)" in capsys.readouterr().out


def test_different_devices_and_quick_runs_are_named(tmp_path, capsys):
    assert exit_code(tmp_path, made_up(), made_up("NVIDIA A100", quick=True)) == 0
    said = capsys.readouterr().out
    assert "! model, nms, roi_align: DIFFERENT DEVICES, NVIDIA H200 and NVIDIA A100" in said
    assert "A QUICK RUN AND A FULL ONE" in said
    assert "200,000 boxes" not in said  # nothing to compare by
    assert "7 compared" in said


def test_cases_of_one_file_alone_are_named(tmp_path, capsys):
    after = made_up()
    del after["nms"]
    assert exit_code(tmp_path, made_up(), after) == 0
    assert "before.json: nms: 10,000 boxes, fastmask\n" in capsys.readouterr().out


def test_nothing_to_compare_is_an_error(tmp_path, capsys):
    assert exit_code(tmp_path, {"nms": made_up()["nms"]}, {"model": made_up()["model"]}) == 2
    (tmp_path / "before.json").write_text("{}]")
    arguments = argparse.Namespace(before=tmp_path / "before.json", after=tmp_path / "after.json", threshold=0.1)
    assert compare.main(arguments) == 2
    assert "before.json: expected results" in capsys.readouterr().err


def test_plots_are_named_without_matplotlib():
    assert list(plots.planned("model", made_up()["model"])) == ["model_latency.svg", "model_waterfall.svg"]
