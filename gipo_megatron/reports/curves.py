"""Figures of metrics over the steps, and of one against another. Each takes the systems to compare
and returns a figure, or why not."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gipo_megatron.reports.runs import Group, Run, in_bins
from gipo_megatron.reports.style import (
    MAX_SMALL,
    NEUTRAL,
    Drawn,
    colour,
    dash,
    marker,
    panels,
    shared_legend,
    visible,
)

MAX_SOURCES = 8


def _line(
    axis: Axes, group: Group, index: int, metric: str, label: str, linestyle: str | None = None
) -> None:
    """The metric over the steps: mean and, for several seeds, the band from lowest to highest. Few
    points get markers."""
    steps, mean, low, high = group.band(metric)
    if not steps:
        return
    x, y = in_bins(steps, mean)
    point = "o" if len(steps) <= 12 else None
    axis.plot(
        x,
        y,
        color=colour(index),
        linestyle=linestyle or dash(index),
        marker=point,
        label=visible(label),
    )
    if len(group.runs) > 1:
        axis.fill_between(
            x,
            in_bins(steps, low)[1],
            in_bins(steps, high)[1],
            color=colour(index),
            alpha=0.18,
            linewidth=0,
        )


def _panel_lines(groups: list[Group], wanted: dict[str, str], columns: int = 2) -> Drawn:
    """One panel per metric that some run has, a line per run. wanted: metric -> title."""
    have = {
        metric: title for metric, title in wanted.items() if any(g.band(metric)[0] for g in groups)
    }
    if not have:
        return f"no {', '.join(wanted)}"
    figure, axes = panels(list(have.values()), columns)
    for axis, metric in zip(axes, have, strict=True):
        for i, group in enumerate(groups):
            _line(axis, group, i, metric, group.label)
        _step_axis(axis)
    shared_legend(figure, axes, at_least=1 if len(groups) > 1 else 2)
    return figure


def _step_axis(axis: Axes) -> None:
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))


def loss(groups: list[Group]) -> Drawn:
    wanted = {
        "sft/loss": "SFT loss (nats per token)",
        "rm/loss": "reward model loss",
        "dpo/loss": "DPO loss",
        "value/loss": "value loss",
    }
    return _panel_lines(groups, {**wanted, "eval/loss": "held-out loss"})


def accuracy(groups: list[Group]) -> Drawn:
    wanted = {
        "rm/accuracy": "accuracy, training pairs",
        "dpo/accuracy": "DPO accuracy, training pairs",
        "eval/accuracy": "accuracy, held-out pairs",
    }
    return _panel_lines(groups, wanted)


def reward(groups: list[Group]) -> Drawn:
    wanted = {
        "reward/score_mean": "score, training prompts",
        "eval/score": "score, held-out prompts",
        "eval/gold": "gold reward, held-out prompts",
    }
    return _panel_lines(groups, wanted, columns=3)


def kl(groups: list[Group]) -> Drawn:
    return _panel_lines(
        groups,
        {
            "kl/mean": "KL to the reference (nats per response)",
            "kl/coef_mean": "mean KL coefficient",
        },
    )


FRONTIERS = (  # KL, reward, title: what a nat of distance from the reference buys
    ("eval/kl", "eval/score", "score, held-out prompts"),
    ("eval/kl", "eval/gold", "gold reward, held-out prompts"),
    ("kl/mean", "reward/score_mean", "score, training prompts"),
)


def frontier(groups: list[Group]) -> Drawn:
    """Reward against √KL (Gao et al. 2023) over training: held-out figures, and the training
    prompts' only where no run has any.

    A system is the mean of its seeds, its end filled; its seeds are thin lines of their own. A
    sampled KL below 0 is 0.
    """
    paths = {
        title: [[_pairs(run, x, y) for run in group.runs] for group in groups]
        for x, y, title in FRONTIERS
    }
    have = [
        title for _, _, title in FRONTIERS if any(seed for group in paths[title] for seed in group)
    ]
    have = [title for title in have if "held-out" in title] or have
    if not have:
        return "no eval/kl with eval/score, no kl/mean with reward/score_mean"
    figure, axes = panels(have)
    for axis, title in zip(axes, have, strict=True):
        for i, (group, seeds) in enumerate(zip(groups, paths[title], strict=True)):
            _path(axis, i, group.label, [seed for seed in seeds if seed])
        axis.set_xlabel("√KL to the reference (√nats)")
    axes[0].set_ylabel("reward")
    shared_legend(figure, axes, at_least=1 if len(groups) > 1 else 2)
    return figure


def _pairs(run: Run, kl: str, reward: str) -> dict[int, tuple[float, float]]:
    """step -> (√KL, reward), where both are there."""
    distances, rewards = (dict(zip(*run.series(metric), strict=True)) for metric in (kl, reward))
    return {
        step: (max(distances[step], 0.0) ** 0.5, rewards[step])
        for step in distances
        if step in rewards
    }


def _path(axis: Axes, index: int, label: str, seeds: list[dict[int, tuple[float, float]]]) -> None:
    steps = sorted(set.intersection(*(set(seed) for seed in seeds))) if seeds else []
    if not steps:
        return
    x, y = (
        in_bins(
            steps, [math.fsum(seed[step][k] for seed in seeds) / len(seeds) for step in steps], 30
        )[1]
        for k in (0, 1)
    )
    axis.plot(
        x,
        y,
        marker=marker(index),
        markerfacecolor="white",
        color=colour(index),
        linestyle=dash(index),
        label=visible(label),
    )
    axis.plot(x[-1:], y[-1:], marker=marker(index), markersize=6, color=colour(index))
    for seed in seeds if len(seeds) > 1 else []:
        path = [in_bins(steps, [seed[step][k] for step in steps], 30)[1] for k in (0, 1)]
        axis.plot(*path, linewidth=0.7, alpha=0.45, color=colour(index), linestyle=dash(index))


def rollout(groups: list[Group]) -> Drawn:
    return _panel_lines(
        groups,
        {
            "rollout/length_mean": "response length (tokens)",
            "rollout/truncated": "share of truncated responses",
        },
    )


def explained_variance(groups: list[Group]) -> Drawn:
    drawn = _panel_lines(groups, {"value/explained_variance": "explained variance of the value"})
    if isinstance(drawn, Figure):
        axis = drawn.axes[0]
        axis.axhline(0, color=NEUTRAL, linewidth=0.8)
        values = [v for g in groups for v in g.band("value/explained_variance")[1]]
        # a cold critic is far below zero: the rest must stay readable
        axis.set_ylim(max(min(values) - 0.05, -1.0), 1.0)
    return drawn


def group_returns(groups: list[Group]) -> Drawn:
    """Return of the high-scoring (easy, solid) and the low-scoring (hard, dashed) group, then their
    gap."""
    pair = ("groups/return_high", "groups/return_low")
    have = [g for g in groups if g.band(pair[0])[0] and g.band(pair[1])[0]]
    gap = [g for g in groups if g.band("groups/gap")[0]]
    if not have and not gap:
        return "no groups/return_high, groups/return_low, groups/gap"
    titles = [
        t
        for t, there in (("group returns (raw score)", have), ("gap between the groups", gap))
        if there
    ]
    figure, axes = panels(titles)
    if have:
        for i, group in enumerate(groups):
            _line(
                axes[0],
                group,
                i,
                pair[0],
                f"{group.label}, high group" if len(groups) == 1 else group.label,
                "-",
            )
            _line(
                axes[0],
                group,
                i,
                pair[1],
                f"{group.label}, low group" if len(groups) == 1 else "",
                "--",
            )
        if len(groups) > 1:
            axes[0].set_title("group returns (high solid, low dashed)")
        _step_axis(axes[0])
    if gap:
        for i, group in enumerate(groups):
            _line(axes[-1], group, i, "groups/gap", "" if len(groups) == 1 else group.label)
        axes[-1].axhline(0, color=NEUTRAL, linewidth=0.8)
        _step_axis(axes[-1])
    shared_legend(figure, axes, at_least=1 if len(groups) > 1 else 2)
    return figure


def sources(groups: list[Group]) -> Drawn:
    return _by_source(groups, "source/", "/score", "score")


def gold_by_source(groups: list[Group]) -> Drawn:
    return _by_source(groups, "eval/gold/", "", "held-out gold reward")


def _by_source(groups: list[Group], prefix: str, suffix: str, quantity: str) -> Drawn:
    """A metric per data source: one run has its sources in one panel, several runs have a panel per
    source."""
    metrics = [
        n
        for n in dict.fromkeys(n for g in groups for n in g.names())
        if n.startswith(prefix) and n.endswith(suffix)
    ]
    metrics = [n for n in metrics if any(g.band(n)[0] for g in groups)]
    if not metrics:
        return f"no {prefix}<name>{suffix}"
    names = [n[len(prefix) : len(n) - len(suffix)] for n in metrics]
    shown, rest = list(zip(metrics, names, strict=True))[:MAX_SOURCES], names[MAX_SOURCES:]
    if len(groups) == 1:
        figure, axes = panels([f"{quantity} by data source"])
        for i, (metric, name) in enumerate(shown):
            _line(axes[0], groups[0], i, metric, name)
    else:
        figure, axes = panels([f"{name}: {quantity}" for _, name in shown], sharey=True)
        for axis, (metric, _) in zip(axes, shown, strict=True):
            for i, group in enumerate(groups):
                _line(axis, group, i, metric, group.label)
    for axis in axes:
        _step_axis(axis)
    shared_legend(figure, axes, at_least=1)
    if rest:
        figure.suptitle(
            f"{len(rest)} more not shown: {', '.join(rest)[:60]}", fontsize=7, color=NEUTRAL
        )
    return figure


def weights(groups: list[Group]) -> Drawn:
    """w_i: mean and the range from smallest to largest, a panel per run."""
    have = [
        (i, g)
        for i, g in enumerate(groups)
        if g.band("weights/min")[0] and g.band("weights/max")[0]
    ][:MAX_SMALL]
    if not have:
        return "no weights/min, weights/max"
    figure, axes = panels([visible(g.label) for _, g in have], sharey=True)
    for axis, (i, group) in zip(axes, have, strict=True):
        steps, low, lowest, _ = group.band("weights/min")
        _, high, _, highest = group.band("weights/max")
        lower, upper = (lowest, highest) if len(group.runs) > 1 else (low, high)
        x, below = in_bins(steps, lower)
        axis.fill_between(
            x,
            below,
            in_bins(steps, upper)[1],
            color=colour(i),
            alpha=0.18,
            linewidth=0,
            label="smallest to largest",
        )
        at, mean = in_bins(*group.band("weights/mean")[:2])
        axis.plot(at, mean, color=colour(i), label="mean")
        axis.axhline(1, color=NEUTRAL, linewidth=0.8, linestyle=":")
        _step_axis(axis)
    axes[0].set_ylabel("weight of a sequence")
    shared_legend(figure, axes)
    return figure
