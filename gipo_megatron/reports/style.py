"""Style of the figures: colours for colour blindness and grey print, sizes for a column of text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito (2008), without yellow
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
# inches: a figure of one panel is one column of a paper wide, any other the text of both columns
COLUMN, PAGE = 3.3, 6.75
SMALLEST = 7  # points: no text in a figure is smaller, printed at that width
HEIGHTS = (2.3, 2.3, 2.0)  # inches, of a panel beside none, one or two others
NEUTRAL = "#666666"
MAX_SMALL = 6  # systems with a panel of their own

Drawn = Figure | str  # a figure, or the reason why there is none

RC: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.edgecolor": NEUTRAL,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "text.parse_math": False,  # a dollar in a run's name is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "gipo_megatron",  # the same data gives the same file
    "pdf.fonttype": 42,
}


@contextmanager
def style() -> Iterator[None]:
    """Set matplotlib's style inside the block."""
    with matplotlib.rc_context(RC):
        yield


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """Return a line style that differs between neighbours: of two equal curves both are seen."""
    return DASHES[index % 2 + 2 * (index // (2 * len(COLOURS)) % 2)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def panels(
    titles: list[str],
    columns: int = 2,
    *,
    sharex: bool = False,
    sharey: bool = False,
    height: float | None = None,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a titled panel each, at most `columns` beside each other. height: inches
    of a panel, instead of HEIGHTS."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    height = HEIGHTS[min(columns, 3) - 1] if height is None else height
    figure = Figure(
        figsize=(COLUMN if columns == 1 else PAGE, height * rows + 0.35), layout="constrained"
    )
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for spare in axes[len(titles) :]:
        spare.remove()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    return figure, axes[: len(titles)]


def shared_legend(
    figure: Figure, axes: list[Axes], at_least: int = 2, ink: str | None = None
) -> None:
    """Put one legend under all panels, each label once; none for fewer labels than `at_least`.

    ink: colour of its lines where a label has another colour in each panel.
    """
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) >= max(at_least, 1):
        width = figure.get_figwidth()
        longest = max(len(label) for label in found)
        columns = max(1, min(len(found), int(width / (0.45 + 0.068 * longest))))
        legend = figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=columns
        )
        if ink is not None:
            for line in legend.get_lines():
                line.set_color(ink)


def label_ends(axis: Axes) -> None:
    """Write each line's last value right of its end, in its colour, none over another."""
    low, high = axis.get_ylim()
    inches = axis.get_window_extent().height / axis.figure.dpi  # before the layout takes its part
    room = 1.2 * RC["font.size"] / (72 * inches) * (high - low)  # of one label, in units of y
    place = -math.inf
    for line in sorted(axis.lines, key=_end):
        place = max(_end(line)[0], place + room)
        axis.annotate(
            f"{_end(line)[0]:.2f}",
            (_end(line)[1], place),
            (4, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
        )


def _end(line: Line2D) -> tuple[float, float]:
    """Return the last y and its x."""
    return float(np.asarray(line.get_ydata())[-1]), float(np.asarray(line.get_xdata())[-1])


def visible(label: str) -> str:
    """Keep a label that begins with an underscore, which matplotlib leaves out of legends."""
    return f" {label}" if label.startswith("_") else label


def pixels(figure: Figure) -> int:
    """Return the width of a figure on an HTML page."""
    return round(figure.get_figwidth() * 105)
