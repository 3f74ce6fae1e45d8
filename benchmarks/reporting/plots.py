"""The report's plots, each drawn from one section.

matplotlib is imported where a plot is drawn: the report names its plots without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.reporting.published import INFERENCE, PAPER_MS
from benchmarks.reporting.results import FASTMASK, Case, Section, Timing, is_fastmask, providers_of
from benchmarks.reporting.style import (
    GREY,
    STAGES,
    STYLE,
    UNKNOWN,
    annotate,
    colours,
    figure_of,
    label_rows,
    legend,
    logarithmic,
)
from benchmarks.reporting.tables import is_end_to_end, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def planned(name: str, section: Section) -> dict[str, Callable[[], Figure]]:
    """The file names of a section's plots, and a function that draws each."""
    plots: dict[str, Callable[[], Figure]] = {}
    if is_end_to_end(section):
        if name == "model":
            plots[f"{name}_latency.svg"] = partial(latency if section.run.on_gpu else speedup, section)
        plots[f"{name}_waterfall.svg"] = partial(waterfall, section)
    if any(case.kind != "scaling" and case.floor_ms for case in section.cases):
        plots[f"{name}_floor.svg"] = partial(floor, section)
    if any(case.axis for case in section.cases):
        plots[f"{name}_scaling.svg"] = partial(scaling, section)
    return plots


def save(draw: Callable[[], Figure], path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        draw().savefig(path, bbox_inches="tight", metadata={"Date": None})


def floor(section: Section) -> Figure:
    """The time of every case, in multiples of its floor."""
    cases = [case for case in section.cases if case.kind != "scaling" and case.floor_ms]
    multiples = [_multiples(case, case.floor_ms) for case in cases if case.floor_ms]
    providers = providers_of(cases)
    chosen = colours(providers)
    figure, (axes,) = figure_of(9, 1.1 + 0.24 * len(cases))
    for row, times in enumerate(multiples):
        axes.plot([min(times.values()), max(times.values())], [row, row], color="#cccccc", linewidth=1, zorder=1)
        if FASTMASK in times:
            left = len(times) == 1 or times[FASTMASK] < max(times.values())
            offset, side = (-6, "right") if left else (6, "left")
            annotate(axes, number(times[FASTMASK]), (times[FASTMASK], row), (offset, 0), ha=side, va="center")
    for provider in providers:
        points = [(times[provider], row) for row, times in enumerate(multiples) if provider in times]
        filled = is_fastmask(provider)
        axes.scatter(
            *zip(*points, strict=True),
            s=34 if filled else 24,
            facecolor=chosen[provider] if filled else "white",
            edgecolor=chosen[provider],
            linewidth=1.4,
            label=provider,
            zorder=3 if filled else 2,
        )
    axes.set_xscale("log")
    logarithmic(axes.xaxis)
    axes.axvline(1, color="black", linewidth=1)
    low, high = axes.get_xlim()
    axes.set_xlim(min(0.6 * low, 0.6), 1.3 * high)  # room for the numbers
    label_rows(axes, [case.name for case in cases])
    axes.set_xlabel("time, in multiples of the floor (1: memory or arithmetic at the rate measured in this run)")
    legend(figure, axes)
    return figure


def _multiples(case: Case, floor_ms: float) -> dict[str, float]:
    """The time of each provider, in multiples of the floor."""
    return {provider: timing.time.median / floor_ms for provider, timing in case.timings.items()}


def scaling(section: Section) -> Figure:
    """Time against size, both logarithmic: the slope of a straight line is the exponent of its growth."""
    axes_names = list(dict.fromkeys(case.axis for case in section.cases if case.axis))
    columns = min(len(axes_names), 2)
    rows = math.ceil(len(axes_names) / columns)
    figure, panels = figure_of(5 * columns, 3.4 * rows, rows, columns)
    chosen = colours(providers_of(section.cases))
    for panel, axis in zip(panels, axes_names, strict=False):
        _curves(panel, [case for case in section.cases if case.axis == axis], chosen, section.run.on_gpu)
        panel.set_title(axis)
    for panel in panels[len(axes_names) :]:
        panel.set_axis_off()
    return figure


def _curves(axes: Axes, cases: list[Case], chosen: dict[str, str], on_gpu: bool) -> None:
    cases = sorted(cases, key=_size)
    unit = 1e-3 if on_gpu else next(case.timings[FASTMASK].time.median for case in cases if FASTMASK in case.timings)
    ends: list[tuple[float, str, str]] = []
    for provider in providers_of(cases):
        ran = [case for case in cases if provider in case.timings]
        sizes, times = [_size(case) for case in ran], [case.timings[provider].time for case in ran]
        colour = chosen[provider]
        medians = [time.median / unit for time in times]
        width = 2.2 if is_fastmask(provider) else 1.3
        axes.plot(sizes, medians, color=colour, linewidth=width, marker="o", markersize=2 * width)
        axes.fill_between(
            sizes, [time.p20 / unit for time in times], [time.p80 / unit for time in times], color=colour, alpha=0.15
        )
        ends.append((medians[-1], provider, colour))
    floors = [case.floor_ms / unit for case in cases if case.floor_ms]
    if len(floors) == len(cases):
        axes.plot([_size(case) for case in cases], floors, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((floors[-1], "floor", GREY))
    axes.set(
        xscale="log", yscale="log", ylabel="microseconds" if on_gpu else "time, fastmask's at the smallest size being 1"
    )
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis)
    axes.grid()
    _label_ends(axes, ends)


def _size(case: Case) -> float:
    assert case.at is not None, f"{case.name}: expected a size on its axis"
    return case.at


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """The name of each curve at its end, moved up where two would overlap."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    above = -math.inf
    for value, label, colour in sorted(ends):
        above = max((math.log(value) - low) / (high - low), above + 0.075)
        axes.text(1.02, above, label, transform=axes.transAxes, color=colour, va="center", fontsize=8.5)


def latency(section: Section) -> Figure:
    """Milliseconds for an image on a GPU, beside published figures and the paper's."""
    cases = section.cases
    providers = providers_of(cases)
    chosen = colours(providers)
    figure, (axes,) = figure_of(9, 1.3 + 0.42 * len(cases))
    for provider in providers:
        points = [
            (_per_image(case, case.timings[provider]), row)
            for row, case in enumerate(cases)
            if provider in case.timings
        ]
        axes.scatter(*zip(*points, strict=True), s=42, color=chosen[provider], label=provider, zorder=3)
    for row, case in enumerate(cases):
        fastest = min(_per_image(case, timing) for timing in case.timings.values())
        annotate(axes, number(fastest), (fastest, row), (-7, 0), ha="right", va="center")
        figures = [latency for latency in INFERENCE if latency.model == case.model and case.images == 1]
        for index, published in enumerate(figures):  # alternately below and above, so that neighbours do not overlap
            axes.scatter(published.ms, row, s=30, marker="D", facecolor="white", edgecolor=GREY, zorder=2)
            offset, side = (5, "bottom") if index % 2 else (-5, "top")
            annotate(axes, published.label, (published.ms, row), (0, offset), ha="center", va=side)
    axes.set_xscale("log")
    logarithmic(axes.xaxis)
    axes.axvline(PAPER_MS, color="black", linewidth=1, linestyle=(0, (4, 3)))
    low, high = axes.get_xlim()
    axes.set_xlim(0.8 * low, high)  # room for the numbers
    label_rows(axes, [case.name for case in cases])
    axes.annotate(
        f"the paper's {PAPER_MS} ms",
        (PAPER_MS, 1),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    axes.set_xlabel("milliseconds for an image; diamonds are published figures of batch 1, on the devices named")
    legend(figure, axes)
    return figure


def _per_image(case: Case, timing: Timing) -> float:
    """Milliseconds for an image."""
    return timing.time.median / (case.images or 1)


def speedup(section: Section) -> Figure:
    """How many times as fast as torchvision: for a CPU, plots show ratios only."""
    bars = [
        (case, provider, ratio)
        for case in section.cases
        for provider in case.timings
        if is_fastmask(provider) and (ratio := case.ratio(provider))
    ]
    chosen = colours(provider for _, provider, _ in bars)
    figure, (axes,) = figure_of(7.5, 1.1 + 0.3 * len(bars))
    for row, (_, provider, ratio) in enumerate(bars):
        axes.barh(row, ratio, 0.62, color=chosen[provider])
        axes.text(ratio, row, f" {number(ratio)}", va="center")
    label_rows(axes, [case.name if provider == FASTMASK else f"{case.name}, {provider}" for case, provider, _ in bars])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as torchvision")
    return figure


def waterfall(section: Section) -> Figure:
    """Each step from torchvision's model to fastmask's fastest, and where its time goes."""
    on_gpu = section.run.on_gpu
    bars = [(case, provider) for case in section.cases for provider in _waterfall_order(case)]
    stages = list(dict.fromkeys(stage for case, provider in bars for stage in case.stages.get(provider, {})))
    palette: dict[str, str] = dict(zip(stages, STAGES, strict=False))
    figure, (axes,) = figure_of(9, 1.2 + 0.25 * len(bars) + 0.3 * len(section.cases))
    row, ticks, longest = 0.0, {}, 0.0
    for case in section.cases:
        axes.text(0, row, f" {case.name}", va="center", weight="bold")
        row += 1
        slowest = case.torchvision() or max(case.timings.values(), key=lambda timing: timing.time.median)
        unit = (case.images or 1) if on_gpu else slowest.time.median
        for provider in _waterfall_order(case):
            total = case.timings[provider].time.median / unit
            longest = max(longest, total)
            _bar(axes, row, total, case.stages.get(provider, {}), palette)
            labels = [f"{number(total)} ms"] if on_gpu else []
            ratio = case.ratio(provider)
            if ratio is not None and is_fastmask(provider):
                labels.append(f"{number(ratio)}x")
            axes.text(total, row, f"  {', '.join(labels)}", va="center")
            ticks[row] = provider
            row += 1
        row += 0.4
    label_rows(axes, list(ticks.values()))
    axes.set_yticks(list(ticks), ticks.values())
    axes.set_ylim(row - 0.8, -0.6)
    axes.set_xlim(0, 1.15 * longest)
    axes.set_xlabel("milliseconds for an image" if on_gpu else "time; torchvision's, or else the slowest, is 1")
    legend(figure, axes)
    return figure


def _waterfall_order(case: Case) -> list[str]:
    """torchvision's steps, then fastmask's, in the order of the case."""
    return sorted(case.timings, key=is_fastmask)


def _bar(axes: Axes, row: float, total: float, stages: dict[str, float], palette: dict[str, str]) -> None:
    """A bar of length `total`, divided by the shares of the stages, which are measured in separate calls."""
    if not stages:
        axes.barh(row, total, 0.75, color="#dddddd", label=UNKNOWN)
        return
    left, share = 0.0, total / sum(stages.values())
    for stage, milliseconds in stages.items():
        axes.barh(
            row,
            milliseconds * share,
            0.75,
            left,
            color=palette.get(stage, GREY),
            edgecolor="white",
            linewidth=0.5,
            label=stage,
        )
        left += milliseconds * share
