"""The figures of a head-to-head evaluation, from results.json and the responses."""

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
        "Share of the judged prompts that the subject wins, ties and loses; whiskers: 95 %"
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
LONGEST = 22  # letters of a name beside a bar

Answers = Mapping[str, Sequence[Response]]  # by policy


def draw_evaluation(results: Mapping[str, Any], responses: Answers) -> dict[str, Figure]:
    """name -> figure, those that the evaluation has the data for; CAPTIONS has the same names.
    results: as in results.json."""
    drawn: dict[str, Drawn] = {}
    with style():
        drawn["win_tie_lose"] = win_tie_lose(results)
        drawn["score_distribution"] = score_distribution(responses)
        drawn["p_high"] = scatter_p_high(
            [
                (name, _values(rows, ("p_high", "score", "length")))
                for name, rows in responses.items()
            ]
        )
    return {name: figure for name, figure in drawn.items() if isinstance(figure, Figure)}


def write_evaluation_figures(
    results: Mapping[str, Any],
    responses: Answers,
    out: str | Path,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Draws into the folder `out`; returns the files."""
    return save(draw_evaluation(results, responses), out, formats)


def win_tie_lose(results: Mapping[str, Any]) -> Drawn:
    """Stacked bars, a panel per task, a bar per opponent: shares of the judged prompts."""
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
        axis.text(
            0.5, row, "nothing judged", ha="center", va="center", fontsize=SMALLEST, color=NEUTRAL
        )
        return
    left = 0.0
    for outcome, fill, ink in OUTCOMES:
        share = cell[outcome] / cell["n"]
        axis.barh(
            row,
            share,
            height=0.78,
            left=left,
            color=fill,
            edgecolor="white",
            linewidth=0.5,
            label=outcome,
        )
        if share >= 0.09:  # a number fits
            axis.text(
                left + share / 2,
                row - 0.1,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=SMALLEST,
                color=ink,
            )
        left += share
    for outcome, mirrored in ((WIN, False), (LOSE, True)):
        low, high = cell["ci95"][outcome]
        ends = (1 - high, 1 - low) if mirrored else (low, high)
        axis.plot(
            ends,
            [row + (0.3 if mirrored else 0.2)] * 2,
            color="black",
            linewidth=0.9,
            marker="|",
            markersize=4,
            clip_on=False,
        )


def score_distribution(responses: Answers) -> Drawn:
    """A panel per task, a histogram and its tails per policy, the same bins within a task."""
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
    """A histogram that stands on y = row and is at most 0.6 high, its tails in small print
    above."""
    if not len(values):
        axis.text(
            0.5,
            row,
            "no responses",
            ha="center",
            va="bottom",
            fontsize=SMALLEST,
            color=NEUTRAL,
            transform=axis.get_yaxis_transform(),
        )
        return
    # rare outliers are counted in the outermost bins
    counts, _ = np.histogram(np.clip(values, bins[0], bins[-1]), bins)
    axis.stairs(
        row - 0.58 * counts / counts.max(),
        bins,
        baseline=row,
        fill=True,
        color=colour(row),
        alpha=0.55,
    )
    statistics = tails(values)
    axis.plot(
        [statistics.mean], [row], marker="^", color="black", markersize=4, clip_on=False, zorder=5
    )
    axis.text(
        0.99,
        row - 0.62,
        str(statistics),
        ha="right",
        va="bottom",
        fontsize=SMALLEST,
        transform=axis.get_yaxis_transform(),
    )


def _values(rows: Sequence[Response], names: tuple[str, ...]) -> np.ndarray:
    """[N, len(names)] of the responses that have them all; `length` is in tokens."""
    figures = [{**r.figures, "length": float(r.tokens)} for r in rows]
    return np.array(
        [[f[n] for n in names] for f in figures if all(n in f for n in names)], dtype=float
    ).reshape(-1, len(names))


def _short(name: str) -> str:
    return visible(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…")
