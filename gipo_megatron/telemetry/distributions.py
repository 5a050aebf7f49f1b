"""Figures of single responses, from samples.jsonl."""

from __future__ import annotations

import numpy as np

from gipo_megatron.telemetry.runs import Group
from gipo_megatron.telemetry.style import MAX_SMALL, NEUTRAL, Drawn, colour, panels, shared_legend, visible

MAX_POINTS = 1500  # of a scatter


def _part(group: Group, keys: tuple[str, ...], part: str) -> np.ndarray:
    """[N, len(keys)] of the samples that have them all: of all steps, or of the first or last fifth of the steps."""
    rows = []
    for run in group.runs:
        there = [row for row in run.samples if all(isinstance(row.get(k), (int, float)) for k in keys)]
        steps = sorted({row["step"] for row in there})
        fifth = max(1, len(steps) // 5)
        wanted = set({"all": steps, "start": steps[:fifth], "end": steps[-fifth:]}[part])
        rows += [[float(row[k]) for k in keys] for row in there if row["step"] in wanted]
    return np.array(rows, dtype=float).reshape(-1, len(keys))


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    if len(x) < 3 or x.std() < 1e-12 or y.std() < 1e-12:
        return "r undefined"
    return f"r = {np.corrcoef(x, y)[0, 1]:+.2f}"


def p_high(groups: list[Group]) -> Drawn:
    """p(high group) against score and against length, end of training: a row per run. What it follows is what the groups mean."""
    keys = ("p_high", "score", "length")
    found = [(i, g, points) for i, g in enumerate(groups) if len(points := _part(g, keys, "end")) and np.ptp(points[:, 0]) > 0][:MAX_SMALL]
    if not found:
        return "no samples with p_high (varying), score and length"
    titles = []
    for _, group, points in found:
        name = f"{group.label}: " if len(found) > 1 else "p(high group) "
        titles += [f"{name}against {what}, {_correlation(points[:, k], points[:, 0])}" for k, what in ((1, "score"), (2, "length"))]
    figure, axes = panels(titles, sharey=True)
    for row, (i, _, points) in enumerate(found):
        thinned = points[:: -(-len(points) // MAX_POINTS)]
        for k, label in ((1, "score"), (2, "response length (tokens)")):
            axis = axes[2 * row + k - 1]
            axis.scatter(thinned[:, k], thinned[:, 0], s=7, color=colour(i), alpha=0.45, linewidths=0)
            axis.set_xlabel(label)
            axis.set_ylabel("p(high group)" if k == 1 else "")
            axis.set_ylim(-0.03, 1.03)
    return figure


def reward_distribution(groups: list[Group]) -> Drawn:
    """Histogram of scores: the first fifth of the steps in grey, the last fifth in colour, a panel per run, the same bins."""
    found = [(i, g, _part(g, ("score",), "start")[:, 0], _part(g, ("score",), "end")[:, 0]) for i, g in enumerate(groups)]
    found = [f for f in found if len(f[2]) and len(f[3])][:MAX_SMALL]
    if not found:
        return "no samples with a score"
    everything = np.concatenate([part for _, _, start, end in found for part in (start, end)])
    low, high = np.quantile(everything, (0.002, 0.998))
    span = max(high - low, 1e-6)
    count = min(len(part) for _, _, start, end in found for part in (start, end))
    bins = np.linspace(low - 0.02 * span, high + 0.02 * span, 1 + min(30, max(8, round(count**0.5))))
    figure, axes = panels([visible(g.label) for _, g, _, _ in found], sharey=True, sharex=True)
    for axis, (i, _, start, end) in zip(axes, found, strict=True):
        for values, fill, label in ((start, NEUTRAL, "start of the run (grey)"), (end, colour(i), "end of the run")):
            share = np.full(len(values), 1 / len(values))
            clipped = np.clip(values, bins[0], bins[-1])  # rare outliers are counted in the outermost bins
            axis.hist(clipped, bins.tolist(), weights=share, color=fill, alpha=0.3 if values is start else 0.5, label=label)
            axis.axvline(values.mean(), color=fill, linewidth=1.2, linestyle="--" if values is start else "-")
        axis.set_xlabel("score")
        axis.tick_params(labelbottom=True)
    axes[0].set_ylabel("share of responses")
    shared_legend(figure, axes)
    return figure
