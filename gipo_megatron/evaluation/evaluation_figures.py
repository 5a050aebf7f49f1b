"""The figures of an evaluation, from results.json and the responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gipo_megatron.evaluation.types import LOSE, TIE, WIN, Response
from gipo_megatron.reports.distributions import scatter_p_high, score_bins, tails
from gipo_megatron.reports.figures import FORMATS, save
from gipo_megatron.reports.style import (
    NEUTRAL,
    SMALLEST,
    Drawn,
    colour,
    panels,
    shared_legend,
    style,
    visible,
)

CAPTIONS = {
    "win_tie_lose": (
        "Share of the judged prompts that the model wins, ties and loses; whiskers: 95 %"
        " intervals of wins and of losses."
    ),
    "score_distribution": (
        "Reward model's scores of the responses; the mark is the mean. Skew and kurtosis (excess)"
        " are 0 for a Gaussian; CVaR₁₀ is the mean of the lowest tenth."
    ),
    "p_high": "Probability of the high-scoring group against the response's score and length.",
}
# outcome, bar, number in it
OUTCOMES = ((WIN, "#0072B2", "white"), (TIE, "#D9D9D9", "black"), (LOSE, "#D55E00", "white"))
BAR: dict[str, Any] = {"height": 0.78, "edgecolor": "white", "linewidth": 0.5}
WHISKER: dict[str, Any] = {"color": "black", "linewidth": 0.9, "marker": "|", "markersize": 4}
CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALLEST}
LONGEST = 22  # letters of a name beside a bar

Responses = Mapping[str, Sequence[Response]]  # by policy


def draw_evaluation(results: Mapping[str, Any], responses: Responses) -> dict[str, Figure]:
    """Return {name: figure} of CAPTIONS, as far as there is data. `results`: as in results.json."""
    systems = [
        (name, _values(rows, ("p_high", "score", "length"))) for name, rows in responses.items()
    ]
    with style():
        drawn: dict[str, Drawn] = {
            "win_tie_lose": win_tie_lose(results),
            "score_distribution": score_distribution(responses),
            "p_high": scatter_p_high(systems),
        }
    return {name: figure for name, figure in drawn.items() if isinstance(figure, Figure)}


def write_evaluation_figures(
    results: Mapping[str, Any],
    responses: Responses,
    out: str | Path,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Draw into the folder `out`; return the files."""
    return save(draw_evaluation(results, responses), out, formats)


def win_tie_lose(results: Mapping[str, Any]) -> Drawn:
    """Draw a panel per task, a stacked bar per baseline: shares of the judged prompts."""
    tasks: dict[str, dict[str, Any]] = {
        task: cells for task, cells in results["tasks"].items() if cells
    }
    if not any(cell["n"] for cells in tasks.values() for cell in cells.values()):
        return "no judged prompts"
    most = max(len(cells) for cells in tasks.values())
    figure, axes = panels(
        [visible(task) for task in tasks], columns=1, sharex=True, height=0.34 * most + 0.35
    )
    for axis, cells in zip(axes, tasks.values(), strict=True):
        for row, cell in enumerate(cells.values()):
            _bar(axis, row, cell)
        names = [f"{_short(name)} ({cell['n']})" for name, cell in cells.items()]
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.45, -0.55)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        axis.grid(False)
        axis.tick_params(axis="y", length=0)
    axes[-1].set_xlabel(f"{_short(results['subject'])} against (n): % of judged prompts")
    shared_legend(figure, axes)
    return figure


def _bar(axis: Axes, row: int, cell: Mapping[str, Any]) -> None:
    if not cell["n"]:
        axis.text(0.5, row, "nothing judged", color=NEUTRAL, **CENTRED)
        return
    left = 0.0
    for outcome, fill, ink in OUTCOMES:
        share = cell[outcome] / cell["n"]
        axis.barh(row, share, left=left, color=fill, label=outcome, **BAR)
        if share >= 0.09:  # a number fits
            axis.text(left + share / 2, row - 0.1, f"{100 * share:.0f}", color=ink, **CENTRED)
        left += share
    low, high = cell["ci95"][WIN]
    axis.plot((low, high), [row + 0.2] * 2, clip_on=False, **WHISKER)
    low, high = cell["ci95"][LOSE]
    axis.plot((1 - high, 1 - low), [row + 0.3] * 2, clip_on=False, **WHISKER)


def score_distribution(responses: Responses) -> Drawn:
    """Draw a panel per task, a histogram with its tails per policy; equal bins within a task."""
    tasks = list(
        dict.fromkeys(r.task for rows in responses.values() for r in rows if "score" in r.figures)
    )
    if not tasks:
        return "no responses with a score"
    figure, axes = panels([visible(task) for task in tasks], height=0.46 * len(responses) + 0.45)
    for axis, task in zip(axes, tasks, strict=True):
        parts = {
            name: np.array(
                [r.figures["score"] for r in rows if r.task == task and "score" in r.figures]
            )
            for name, rows in responses.items()
        }
        bins = score_bins([part for part in parts.values() if len(part)])
        for row, values in enumerate(parts.values()):
            _ridge(axis, row, values, bins)
        axis.set_yticks(range(len(parts)), [_short(name) for name in parts])
        axis.set_ylim(len(parts) - 0.95, -0.95)
        axis.set_xlabel("score")
        axis.tick_params(axis="y", length=0)
    return figure


def _ridge(axis: Axes, row: int, values: np.ndarray, bins: np.ndarray) -> None:
    """Draw a histogram on y = row, at most 0.6 high, with its tails in small print above."""
    note: dict[str, Any] = {"va": "bottom", "fontsize": SMALLEST}
    note["transform"] = axis.get_yaxis_transform()
    if not len(values):
        axis.text(0.5, row, "no responses", ha="center", color=NEUTRAL, **note)
        return
    # rare outliers are counted in the outermost bins
    counts, _ = np.histogram(np.clip(values, bins[0], bins[-1]), bins)
    heights = row - 0.58 * counts / counts.max()
    axis.stairs(heights, bins, baseline=row, fill=True, color=colour(row), alpha=0.55)
    statistics = tails(values)
    axis.plot(
        [statistics.mean], [row], marker="^", color="black", markersize=4, clip_on=False, zorder=5
    )
    axis.text(0.99, row - 0.62, str(statistics), ha="right", **note)


def _values(rows: Sequence[Response], names: tuple[str, ...]) -> np.ndarray:
    """Return [N, len(names)] of the responses with all figures; `length` is in tokens."""
    figures = [{**r.figures, "length": float(r.tokens)} for r in rows]
    return np.array(
        [[f[n] for n in names] for f in figures if all(n in f for n in names)], dtype=float
    ).reshape(-1, len(names))


def _short(name: str) -> str:
    return visible(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…")
