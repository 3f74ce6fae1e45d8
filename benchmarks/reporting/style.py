"""The look of the plots: SVG with text as text, the same bytes for the same results.

The colours are those of Okabe and Ito and of Paul Tol, which remain distinct to the colour-blind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from benchmarks.reporting.results import FASTMASK, TORCHVISION, is_fastmask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {  # of matplotlib
    "svg.fonttype": "none",
    "svg.hashsalt": FASTMASK,
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
BLUES = ("#0072B2", "#56A5D8", "#003F66", "#8CC4E8")  # fastmask
REDS = ("#D55E00", "#E69F00")  # torchvision
OTHERS = ("#009E73", "#CC79A7", "#7A5C3E", "#888888")
STAGES = ("#332288", "#88CCEE", "#44AA99", "#117733", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#999933", "#BBBBBB")
GREY = "#666666"
UNKNOWN = "stages not measured"


def colours(providers: Iterable[str]) -> dict[str, str]:
    """fastmask in blue, torchvision in red, others in other colours."""
    chosen: dict[str, str] = {}
    for provider in providers:
        palette = BLUES if is_fastmask(provider) else REDS if provider in TORCHVISION else OTHERS
        unused = [colour for colour in palette if colour not in chosen.values()]
        chosen.setdefault(provider, unused[0] if unused else GREY)
    return chosen


def figure_of(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def label_rows(axes: Axes, labels: list[str]) -> None:
    """A category on each row, the first at the top, without an axis line."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def logarithmic(axis: Axis) -> None:
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter("")


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(sorted(zip(labels, handles, strict=True), key=lambda entry: entry[0] == UNKNOWN))
    figure.legend(unique.values(), unique.keys(), loc="outside upper left", ncols=min(len(unique), 5))


def annotate(axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **place: Any) -> None:
    """Small text at an offset, in points, from a point of the data."""
    axes.annotate(text, point, offset, textcoords="offset points", fontsize=7.5, color=GREY, **place)
