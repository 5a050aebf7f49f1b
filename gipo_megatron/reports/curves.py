"""Figures of metrics over the steps, and of one against another. Each takes the groups of runs to
compare and returns a figure, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gipo_megatron.reports.runs import RunFolder, SeedGroup, in_bins
from gipo_megatron.reports.style import (
    MAX_SMALL,
    NEUTRAL,
    Drawn,
    colour,
    dash,
    label_ends,
    marker,
    panels,
    shared_legend,
    visible,
)

MAX_SOURCES = 8
Draw = Callable[[list[SeedGroup]], Drawn]


def lines(titles: Mapping[str, str], columns: int = 2) -> Draw:
    """Return a figure with a panel for each metric that some run has. titles: metric -> title."""
    return lambda groups: _lines(groups, titles, columns)


def _lines(groups: list[SeedGroup], titles: Mapping[str, str], columns: int = 2) -> Drawn:
    have = {m: title for m, title in titles.items() if any(g.band(m)[0] for g in groups)}
    if not have:
        return f"no {', '.join(titles)}"
    figure, axes = panels(list(have.values()), columns)
    for axis, metric in zip(axes, have, strict=True):
        for i, group in enumerate(groups):
            _line(axis, group, i, metric, group.label)
        low, high = axis.get_ylim()
        if high - low < 1e-3 * abs(low):  # a constant and its rounding
            axis.set_ylim(*sorted((0.9 * low, 1.1 * low)))
    _legend(figure, axes, groups)
    return figure


def _line(
    axis: Axes, group: SeedGroup, index: int, metric: str, label: str, linestyle: str | None = None
) -> None:
    """Draw the mean and, for several seeds, the band from lowest to highest. Few points get
    markers."""
    _step_axis(axis)
    steps, mean, low, high = group.band(metric)
    if not steps:
        return
    line = linestyle or dash(index)
    axis.plot(
        *in_bins(steps, mean),
        color=colour(index),
        linestyle=line,
        zorder=2 if line == "-" else 2.1,  # an equal solid line would hide it
        marker=marker(index) if len(steps) <= 12 else None,
        label=visible(label),
    )
    if len(group.runs) > 1:
        _fill(axis, index, steps, low, high)


def _step_axis(axis: Axes) -> None:
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))


def _fill(
    axis: Axes, index: int, steps: list[int], low: list[float], high: list[float], label: str = ""
) -> None:
    x, below = in_bins(steps, low)
    above = in_bins(steps, high)[1]
    axis.fill_between(x, below, above, color=colour(index), alpha=0.18, linewidth=0, label=label)


def _legend(figure: Figure, axes: list[Axes], groups: list[SeedGroup]) -> None:
    shared_legend(figure, axes, at_least=1 if len(groups) > 1 else 2)


def losses(groups: list[SeedGroup]) -> Drawn:
    """Draw each `<name>/loss` but the policy's, whose value has no meaning; held-out last."""
    have = [name for name in names(groups, "", "/loss") if name != "policy"]
    titles = {f"{n}/loss": "held-out loss" if n == "eval" else f"{n} loss" for n in have}
    return _lines(groups, titles) if titles else "no <name>/loss"


def accuracies(groups: list[SeedGroup]) -> Drawn:
    """Draw each `<name>/accuracy`; held-out last."""
    titles = {
        f"{name}/accuracy": f"accuracy, {'held-out' if name == 'eval' else 'training'} pairs"
        for name in names(groups, "", "/accuracy")
    }
    return _lines(groups, titles) if titles else "no <name>/accuracy"


def names(groups: list[SeedGroup], prefix: str, suffix: str) -> list[str]:
    """Return <name> of the metrics <prefix><name><suffix> that some run has, in order of first
    appearance, `eval` last."""
    found = []
    for metric in dict.fromkeys(metric for group in groups for metric in group.names()):
        matches = metric.startswith(prefix) and metric.endswith(suffix)
        if matches and any(group.band(metric)[0] for group in groups):
            found.append(metric[len(prefix) : len(metric) - len(suffix)])
    return sorted(found, key=lambda name: name == "eval")


# KL, reward, title
FRONTIERS = (
    ("eval/kl", "eval/score", "score, held-out prompts"),
    ("eval/kl", "eval/gold", "gold reward, held-out prompts"),
    ("kl/mean", "reward/score_mean", "score, training prompts"),
)


def frontier(groups: list[SeedGroup]) -> Drawn:
    """Draw reward against √KL (Gao et al. 2023) over training: held-out figures, and the training
    prompts' only where no run has any.

    A group is the mean of its seeds, its end filled; its seeds are thin lines. A sampled KL below 0
    is 0.
    """
    paths = {
        title: [[_pairs(run, x, y) for run in group.runs] for group in groups]
        for x, y, title in FRONTIERS
    }
    have = [title for title, found in paths.items() if any(map(any, found))]
    have = [title for title in have if "held-out" in title] or have
    if not have:
        return "no eval/kl with eval/score, no kl/mean with reward/score_mean"
    figure, axes = panels(have)
    for axis, title in zip(axes, have, strict=True):
        for i, (group, seeds) in enumerate(zip(groups, paths[title], strict=True)):
            _path(axis, i, group.label, [seed for seed in seeds if seed])
        axis.set_xlabel("√KL to the reference (√nats)")
    axes[0].set_ylabel("reward")
    _legend(figure, axes, groups)
    return figure


def _pairs(run: RunFolder, kl: str, reward: str) -> dict[int, tuple[float, float]]:
    """step -> (√KL, reward), where the run has both."""
    distances, rewards = (dict(zip(*run.series(metric), strict=True)) for metric in (kl, reward))
    return {
        step: (max(distances[step], 0.0) ** 0.5, rewards[step])
        for step in distances
        if step in rewards
    }


def _path(axis: Axes, index: int, label: str, seeds: list[dict[int, tuple[float, float]]]) -> None:
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not steps:
        return
    look: dict[str, Any] = {"color": colour(index), "linestyle": dash(index)}
    own = [[[seed[step][k] for step in steps] for k in (0, 1)] for seed in seeds]
    mean = [[math.fsum(v) / len(v) for v in zip(*(s[k] for s in own), strict=True)] for k in (0, 1)]
    x, y = (in_bins(steps, values, 30)[1] for values in mean)
    point = marker(index)
    axis.plot(x, y, marker=point, markerfacecolor="white", label=visible(label), **look)
    axis.plot(x[-1:], y[-1:], marker=point, markersize=6, color=colour(index))
    for seed in own if len(own) > 1 else []:
        path = [in_bins(steps, values, 30)[1] for values in seed]
        axis.plot(*path, linewidth=0.7, alpha=0.45, **look)


def explained_variance(groups: list[SeedGroup]) -> Drawn:
    metric = "value/explained_variance"
    drawn = _lines(groups, {metric: "explained variance of the value"})
    if isinstance(drawn, Figure):
        axis = drawn.axes[0]
        axis.axhline(0, color=NEUTRAL, linewidth=0.8)
        lowest = min(value for group in groups for value in group.band(metric)[1])
        # a new critic is far below zero: the rest must stay readable
        axis.set_ylim(max(lowest - 0.05, -1.0), 1.0)
    return drawn


GROUP_LINES = (
    ("groups/return_high", "high group", "-"),
    ("groups/return_low", "low group", "--"),
    ("groups/gap", "gap", ":"),
)


def group_returns(groups: list[SeedGroup]) -> Drawn:
    """Draw the returns of the high-scoring and of the low-scoring group and their gap, a panel per
    run with one scale: the groups of two runs are those of two classifiers."""
    metrics = [metric for metric, _, _ in GROUP_LINES]
    have = [(i, g) for i, g in enumerate(groups) if any(g.band(metric)[0] for metric in metrics)]
    if not have:
        return f"no {', '.join(metrics)}"
    have = have[:MAX_SMALL]
    figure, axes = panels([visible(g.label) for _, g in have], sharey=True)
    for axis, (i, group) in zip(axes, have, strict=True):
        for metric, label, linestyle in GROUP_LINES:
            _line(axis, group, i, metric, label, linestyle)
        axis.axhline(0, color=NEUTRAL, linewidth=0.8)
    axes[0].set_ylabel("return (raw score)")
    shared_legend(figure, axes, ink=NEUTRAL)
    return figure


def sources(groups: list[SeedGroup]) -> Drawn:
    """Draw the score by data source: one run has its sources in one panel, several runs have a
    panel per source."""
    found = names(groups, "source/", "/score")
    if not found:
        return "no source/<name>/score"
    shown = found[:MAX_SOURCES]
    if len(groups) == 1:
        figure, axes = panels(["score by data source"])
        for i, name in enumerate(shown):
            _line(axes[0], groups[0], i, f"source/{name}/score", name)
    else:
        figure, axes = panels([f"{name}: score" for name in shown], sharey=True)
        for axis, name in zip(axes, shown, strict=True):
            for i, group in enumerate(groups):
                _line(axis, group, i, f"source/{name}/score", group.label)
    shared_legend(figure, axes, at_least=1)
    _name_rest(figure, found)
    return figure


def gold_by_source(groups: list[SeedGroup]) -> Drawn:
    """Draw held-out gold, a panel per data source and one for all prompts, with one scale and the
    last values in figures."""
    found = names(groups, "eval/gold/", "")
    titles = {f"eval/gold/{name}": f"{name} prompts" for name in found[:MAX_SOURCES]}
    drawn = _lines(groups, titles | {"eval/gold": "all prompts"}, columns=3)
    if not found or isinstance(drawn, str):
        return "no eval/gold/<name>"
    limits = [limit for axis in drawn.axes for limit in axis.get_ylim()]
    for axis in drawn.axes:
        axis.set_ylim(min(limits), max(limits))
        label_ends(axis)
    drawn.axes[0].set_ylabel("gold reward, held-out")
    _name_rest(drawn, found)
    return drawn


def _name_rest(figure: Figure, found: list[str]) -> None:
    if rest := found[MAX_SOURCES:]:
        text = f"{len(rest)} more not shown: {', '.join(rest)[:60]}"
        figure.suptitle(text, fontsize=7, color=NEUTRAL)


def weights(groups: list[SeedGroup]) -> Drawn:
    """Draw w_i: mean and the range from smallest to largest, a panel per group of runs."""
    low, high = "weights/min", "weights/max"
    have = [(i, g) for i, g in enumerate(groups) if g.band(low)[0] and g.band(high)[0]][:MAX_SMALL]
    if not have:
        return f"no {low}, {high}"
    figure, axes = panels([visible(g.label) for _, g in have], sharey=True)
    for axis, (i, group) in zip(axes, have, strict=True):
        steps, _, lowest, _ = group.band(low)
        _fill(axis, i, steps, lowest, group.band(high)[3], "smallest to largest")
        at, mean = in_bins(*group.band("weights/mean")[:2])
        axis.plot(at, mean, color=colour(i), label="mean")
        _step_axis(axis)
        axis.axhline(1, color=NEUTRAL, linewidth=0.8, linestyle=":")
    axes[0].set_ylabel("weight of a sequence")
    shared_legend(figure, axes)
    return figure
