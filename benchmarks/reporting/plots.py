"""The report's plots. Each is drawn from one section; SVG with text as text, the same bytes for the same results.

Colours are Okabe and Ito's and Paul Tol's, which the colour-blind tell apart. matplotlib is imported where a plot is
drawn: the report names its plots without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.reporting.published import INFERENCE, PAPER_MS
from benchmarks.reporting.results import OURS, TORCHVISION, Case, Section, is_ours, who_ran
from benchmarks.reporting.tables import is_end_to_end, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": OURS,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
BLUES = ("#0072B2", "#56A5D8", "#003F66", "#8CC4E8")  # ours
REDS = ("#D55E00", "#E69F00")  # torchvision's
OTHERS = ("#009E73", "#CC79A7", "#7A5C3E", "#888888")
STAGES = ("#332288", "#88CCEE", "#44AA99", "#117733", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#999933", "#BBBBBB")
GREY = "#666666"
UNKNOWN = "stages not measured"


def planned(name: str, section: Section) -> dict[str, Callable[[], Figure]]:
    """File names, and what draws each."""
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


def colours(providers: Iterable[str]) -> dict[str, str]:
    """Ours in blue, torchvision in red, in the order in which they come."""
    chosen: dict[str, str] = {}
    for provider in providers:
        palette = BLUES if is_ours(provider) else REDS if provider in TORCHVISION else OTHERS
        left = [colour for colour in palette if colour not in chosen.values()]
        chosen.setdefault(provider, left[0] if left else GREY)
    return chosen


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _rows(axes: Axes, labels: list[str]) -> None:
    """A category on each row, the first at the top, and no line to hold them."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _logarithmic(axis: object) -> None:
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter("")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(sorted(zip(labels, handles, strict=True), key=lambda entry: entry[0] == UNKNOWN))
    figure.legend(unique.values(), unique.keys(), loc="outside upper left", ncols=min(len(unique), 5))


def _beside(axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **place: str) -> None:
    """Small print, so many points away from a mark."""
    axes.annotate(text, point, offset, textcoords="offset points", fontsize=7.5, color=GREY, **place)


def floor(section: Section) -> Figure:
    """How far every case is from what the hardware could do."""
    cases = [case for case in section.cases if case.kind != "scaling" and case.floor_ms]
    providers = who_ran(cases)
    chosen = colours(providers)
    figure, (axes,) = _figure(9, 1.1 + 0.24 * len(cases))
    for row, case in enumerate(cases):
        times = {name: timing.time.median / case.floor_ms for name, timing in case.timings.items()}
        axes.plot([min(times.values()), max(times.values())], [row, row], color="#cccccc", linewidth=1, zorder=1)
        if OURS in times:
            left = len(times) == 1 or times[OURS] < max(times.values())
            offset, side = (-6, "right") if left else (6, "left")
            _beside(axes, number(times[OURS]), (times[OURS], row), (offset, 0), ha=side, va="center")
    for provider in providers:
        points = [
            (case.timings[provider].time.median / case.floor_ms, row)
            for row, case in enumerate(cases)
            if provider in case.timings
        ]
        ours = is_ours(provider)
        axes.scatter(
            *zip(*points, strict=True),
            s=34 if ours else 24,
            facecolor=chosen[provider] if ours else "white",
            edgecolor=chosen[provider],
            linewidth=1.4,
            label=provider,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log")
    _logarithmic(axes.xaxis)
    axes.axvline(1, color="black", linewidth=1)
    low, high = axes.get_xlim()
    axes.set_xlim(min(0.6 * low, 0.6), 1.3 * high)  # room for the numbers
    _rows(axes, [case.name for case in cases])
    axes.set_xlabel("time, in multiples of the floor (1: memory or arithmetic at the rate measured in this run)")
    _legend(figure, axes)
    return figure


def scaling(section: Section) -> Figure:
    """Time against size, both logarithmic: a straight line's slope is the power with which it grows."""
    axes_names = list(dict.fromkeys(case.axis for case in section.cases if case.axis))
    columns = min(len(axes_names), 2)
    rows = math.ceil(len(axes_names) / columns)
    figure, panels = _figure(5 * columns, 3.4 * rows, rows, columns)
    chosen = colours(who_ran(section.cases))
    for panel, axis in zip(panels, axes_names, strict=False):
        _curves(panel, [case for case in section.cases if case.axis == axis], chosen, section.run.on_gpu)
        panel.set_title(axis)
    for panel in panels[len(axes_names) :]:
        panel.set_axis_off()
    return figure


def _curves(axes: Axes, cases: list[Case], chosen: dict[str, str], on_gpu: bool) -> None:
    cases = sorted(cases, key=lambda case: case.at)
    unit = 1e-3 if on_gpu else next(case.timings[OURS].time.median for case in cases if OURS in case.timings)
    ends: list[tuple[float, str, str]] = []
    for provider in who_ran(cases):
        ran = [(case.at, case.timings[provider].time) for case in cases if provider in case.timings]
        sizes, times = zip(*ran, strict=True)
        colour = chosen[provider]
        medians = [time.median / unit for time in times]
        width = 2.2 if is_ours(provider) else 1.3
        axes.plot(sizes, medians, color=colour, linewidth=width, marker="o", markersize=2 * width)
        axes.fill_between(
            sizes, [time.p20 / unit for time in times], [time.p80 / unit for time in times], color=colour, alpha=0.15
        )
        ends.append((medians[-1], provider, colour))
    if all(case.floor_ms for case in cases):
        floors = [case.floor_ms / unit for case in cases]
        axes.plot([case.at for case in cases], floors, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((floors[-1], "floor", GREY))
    axes.set(xscale="log", yscale="log", ylabel="microseconds" if on_gpu else "time, ours at the smallest being 1")
    _logarithmic(axes.xaxis)
    _logarithmic(axes.yaxis)
    axes.grid()
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """A curve's name where it ends, pushed up where two would overlap."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    above = -math.inf
    for value, label, colour in sorted(ends):
        above = max((math.log(value) - low) / (high - low), above + 0.075)
        axes.text(1.02, above, label, transform=axes.transAxes, color=colour, va="center", fontsize=8.5)


def latency(section: Section) -> Figure:
    """A GPU's milliseconds for an image, beside the published ones and the paper's line."""
    cases = section.cases
    providers = who_ran(cases)
    chosen = colours(providers)
    figure, (axes,) = _figure(9, 1.3 + 0.42 * len(cases))
    for provider in providers:
        points = [
            (case.timings[provider].time.median / case.images, row)
            for row, case in enumerate(cases)
            if provider in case.timings
        ]
        axes.scatter(*zip(*points, strict=True), s=42, color=chosen[provider], label=provider, zorder=3)
    for row, case in enumerate(cases):
        fastest = min(timing.time.median for timing in case.timings.values()) / case.images
        _beside(axes, number(fastest), (fastest, row), (-7, 0), ha="right", va="center")
        others = [figure for figure in INFERENCE if figure.model == case.model and case.images == 1]
        for index, published in enumerate(others):  # every other one above, or neighbours would overlap
            axes.scatter(published.ms, row, s=30, marker="D", facecolor="white", edgecolor=GREY, zorder=2)
            offset, side = (5, "bottom") if index % 2 else (-5, "top")
            _beside(axes, published.label, (published.ms, row), (0, offset), ha="center", va=side)
    axes.set_xscale("log")
    _logarithmic(axes.xaxis)
    axes.axvline(PAPER_MS, color="black", linewidth=1, linestyle=(0, (4, 3)))
    low, high = axes.get_xlim()
    axes.set_xlim(0.8 * low, high)  # room for the numbers
    _rows(axes, [case.name for case in cases])
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
    _legend(figure, axes)
    return figure


def speedup(section: Section) -> Figure:
    """Of a CPU only ratios are shown."""
    bars = [
        (case, provider)
        for case in section.cases
        for provider in case.timings
        if is_ours(provider) and case.ratio(provider)
    ]
    chosen = colours(provider for _, provider in bars)
    figure, (axes,) = _figure(7.5, 1.1 + 0.3 * len(bars))
    for row, (case, provider) in enumerate(bars):
        ratio = case.ratio(provider)
        axes.barh(row, ratio, 0.62, color=chosen[provider])
        axes.text(ratio, row, f" {number(ratio)}", va="center")
    _rows(axes, [case.name if provider == OURS else f"{case.name}, {provider}" for case, provider in bars])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as torchvision")
    return figure


def waterfall(section: Section) -> Figure:
    """Each step from torchvision's model to our fastest, and where its time goes."""
    on_gpu = section.run.on_gpu
    bars = [(case, provider) for case in section.cases for provider in _waterfall_order(case)]
    stages = list(dict.fromkeys(stage for case, provider in bars for stage in case.stages.get(provider, {})))
    palette = dict(zip(stages, STAGES, strict=False))
    figure, (axes,) = _figure(9, 1.2 + 0.25 * len(bars) + 0.3 * len(section.cases))
    row, ticks, longest = 0.0, {}, 0.0
    for case in section.cases:
        axes.text(0, row, f" {case.name}", va="center", weight="bold")
        row += 1
        slowest = case.peer() or max(case.timings.values(), key=lambda timing: timing.time.median)
        unit = case.images if on_gpu else slowest.time.median
        for provider in _waterfall_order(case):
            total = case.timings[provider].time.median / unit
            longest = max(longest, total)
            _bar(axes, row, total, case.stages.get(provider, {}), palette)
            said = [f"{number(total)} ms"] if on_gpu else []
            if case.peer() and is_ours(provider):
                said.append(f"{number(case.ratio(provider))}x")
            axes.text(total, row, f"  {', '.join(said)}", va="center")
            ticks[row] = provider
            row += 1
        row += 0.4
    _rows(axes, list(ticks.values()))
    axes.set_yticks(list(ticks), ticks.values())
    axes.set_ylim(row - 0.8, -0.6)
    axes.set_xlim(0, 1.15 * longest)
    axes.set_xlabel("milliseconds for an image" if on_gpu else "time; torchvision's, or else the slowest, is 1")
    _legend(figure, axes)
    return figure


def _waterfall_order(case: Case) -> list[str]:
    """From torchvision's to ours, each as it was measured: the steps are in the order of the case."""
    return sorted(case.timings, key=is_ours)


def _bar(axes: Axes, row: float, total: float, stages: dict[str, float], palette: dict[str, str]) -> None:
    """Stages are timed in calls of their own: their shares count, the total is that of the rounds."""
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
