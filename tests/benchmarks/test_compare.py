"""`python -m benchmarks compare`: regressions beyond the noise fail, and limits of a comparison are named."""

import argparse
from dataclasses import replace

import pytest

from benchmarks.reporting import compare
from benchmarks.reporting.results import FASTMASK, Spread, Timing, save
from tests.benchmarks.made_up_results import made_up, spread, timing

pytestmark = pytest.mark.reference_only


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
    case = replace(after["roi_align"].cases[0], timings={FASTMASK: noisy})
    assert exit_code(tmp_path, made_up(), after | {"roi_align": replace(after["roi_align"], cases=[case])}) == 0


def test_cpus_are_compared_by_torchvisions_time(tmp_path, capsys):
    """A machine that is twice as slow is no regression; a ratio to torchvision that doubles is one."""
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
