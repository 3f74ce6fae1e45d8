"""Reports of results: tables, plots, the README."""

import argparse

import pytest

from benchmarks.reporting import plots, report
from benchmarks.reporting.results import FOLDER, Case, load, save
from benchmarks.reporting.tables import number, table
from tests.benchmarks.made_up_results import made_up, timing

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


def test_a_gpu_report_has_every_figure():
    text = report.document("nvidia-h200.json", made_up())
    assert "NVIDIA H200, 2 CPU threads, driver 580.95, torch 2.11.0; detectron2 is missing: not installed." in text
    assert "| nms | 2026-01-02 03:04 | `0123456789-dirty` | 4,000 | 50.0 |" in text
    assert "as fast as torchvision or faster in 4 of 5 cases, and meets 0 of 1 targets." in text
    assert rows(text, "nms: 10,000 boxes") == ["| nms: 10,000 boxes | torchvision | 0.80 |"]
    assert rows(text, "roi_align: 1000 RoIs") == ["| roi_align: 1000 RoIs | 5.00 | 8.00 |"]
    against_peers, against_hardware = rows(text, "1000 RoIs")
    assert against_peers == ("| 1000 RoIs | paper | 9 | 20.0 (19.6-20.4) | 100 (98.0-102): 5.00x | 8.00, **missed** |")
    # MB, floor, times the floor, then warm, graph, latency, syncs and MiB of fastmask and of torchvision.
    assert against_hardware == (
        "| 1000 RoIs | 40.0 | 10.0 | 2.00 | 16.0 | 14.0 | 40.0 | 0 | 1.50 | 80.0 | 70.0 | 120 | 0 | 1.50 |"
    )
    assert "40.0 (39.2-40.8): **0.80x**" in rows(text, "10,000 boxes")[0]
    assert "- torchvision (out of memory): 200,000 boxes" in text


def test_a_gpu_report_of_a_detector_has_every_step_and_published_figures():
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


def test_plots_are_named_without_matplotlib():
    assert list(plots.planned("model", made_up()["model"])) == ["model_latency.svg", "model_waterfall.svg"]


@pytest.mark.parametrize(
    ("peers", "met"),
    [({}, None), ({"slow": 100, "usual": 20}, True), ({"usual": 19}, False), ({"torchvision": 19, "usual": 20}, False)],
)
def test_a_target_is_for_torchvision_or_else_the_fastest_peer(peers, met):
    timings = {name: timing(value, on_gpu=False) for name, value in ({"fastmask": 10} | peers).items()}
    assert Case("100 masks", "paper", timings, target=2).meets_target is met
