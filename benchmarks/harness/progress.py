"""A plugin, `pytest -p benchmarks.harness.progress`: a progress bar, with failures above it, replaces the report."""

import sys

from tqdm import tqdm

bar = tqdm(unit="case", delay=1)


def pytest_collectreport(report):
    if report.failed:
        print(report.longreprtext, file=sys.stderr)


def pytest_collection_finish(session):
    bar.reset(len(session.items))


def pytest_runtest_logstart(nodeid):
    bar.set_description_str(nodeid.rpartition("bench_")[2])


def pytest_runtest_logreport(report):
    if report.failed:
        bar.write(f"{report.nodeid}, {report.when}\n{report.longreprtext}", file=sys.stderr)
    if report.when == "teardown":
        bar.update()


def pytest_unconfigure():
    bar.close()
