"""The figures of one or several runs, from their folders. A figure without data is not drawn but named with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gipo_megatron.telemetry.runs import Group, Run, group_by_seed, in_bins, load_run
from gipo_megatron.telemetry.style import NEUTRAL, colour, dash, panels, shared_legend, style, visible

MAX_POINTS = 1500  # of a scatter
MAX_SOURCES = 8
MAX_SMALL = 6  # runs with a panel of their own

Drawn = Figure | str  # a figure, or why there is none


@dataclass(frozen=True)
class Figures:
    drawn: dict[str, Figure]
    missing: dict[str, str]  # name -> what the runs lack


def draw(runs: Sequence[Run]) -> Figures:
    """All figures; runs that differ only in their seed are one line with a band."""
    groups = group_by_seed(runs)
    drawn: dict[str, Figure] = {}
    missing: dict[str, str] = {}
    for name, make in FIGURES.items():
        with style():
            figure = make(groups)
        if isinstance(figure, Figure):
            drawn[name] = figure
        else:
            missing[name] = figure
    return Figures(drawn, missing)


def write_figures(
    run_dirs: Sequence[str | Path], out: str | Path, formats: Sequence[str] = ("png", "svg")
) -> tuple[list[Path], dict[str, str]]:
    """Draws into `out`; returns the files written and {figure: why it was not drawn}. Raises UserError as load_run does."""
    figures = draw([load_run(d) for d in run_dirs])
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.drawn.items():
        for kind in formats:
            save(figure, folder / f"{name}.{kind}")
            written.append(folder / f"{name}.{kind}")
    return written, figures.missing


def save(figure: Figure, path: Path) -> None:
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[path.suffix[1:]]
    with style():
        figure.savefig(path, dpi=160, facecolor="white", metadata=metadata)


# --------------------------------------------------------------------------------------------- lines over steps


def _line(axis: Axes, group: Group, index: int, metric: str, label: str, linestyle: str | None = None) -> None:
    """The metric over the steps: mean and, for several seeds, the band from lowest to highest. Few points get markers."""
    steps, mean, low, high = group.band(metric)
    if not steps:
        return
    x, y = in_bins(steps, mean)
    marker = "o" if len(steps) <= 12 else None
    axis.plot(x, y, color=colour(index), linestyle=linestyle or dash(index), marker=marker, label=visible(label))
    if len(group.runs) > 1:
        axis.fill_between(x, in_bins(steps, low)[1], in_bins(steps, high)[1], color=colour(index), alpha=0.18, linewidth=0)


def _panel_lines(groups: list[Group], wanted: dict[str, str], columns: int = 2) -> Drawn:
    """One panel per metric that some run has, a line per run. wanted: metric -> title."""
    have = {metric: title for metric, title in wanted.items() if any(g.band(metric)[0] for g in groups)}
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
    wanted = {"sft/loss": "SFT loss (nats per token)", "rm/loss": "reward model loss", "dpo/loss": "DPO loss", "value/loss": "value loss"}
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
    return _panel_lines(groups, {"kl/mean": "KL to the reference (nats per response)", "kl/coef_mean": "mean KL coefficient"})


def rollout(groups: list[Group]) -> Drawn:
    return _panel_lines(groups, {"rollout/length_mean": "response length (tokens)", "rollout/truncated": "share of truncated responses"})


def explained_variance(groups: list[Group]) -> Drawn:
    drawn = _panel_lines(groups, {"value/explained_variance": "explained variance of the value"})
    if isinstance(drawn, Figure):
        axis = drawn.axes[0]
        axis.axhline(0, color=NEUTRAL, linewidth=0.8)
        values = [v for g in groups for v in g.band("value/explained_variance")[1]]
        axis.set_ylim(max(min(values) - 0.05, -1.0), 1.0)  # a cold critic is far below zero: the rest must stay readable
    return drawn


def group_returns(groups: list[Group]) -> Drawn:
    """Return of the high (solid) and the low group (dashed), then their gap: a gap closing from above is levelling down."""
    pair = ("groups/return_high", "groups/return_low")
    have = [g for g in groups if g.band(pair[0])[0] and g.band(pair[1])[0]]
    gap = [g for g in groups if g.band("groups/gap")[0]]
    if not have and not gap:
        return "no groups/return_high, groups/return_low, groups/gap"
    titles = [t for t, there in (("group returns (raw score)", have), ("gap between the groups", gap)) if there]
    figure, axes = panels(titles)
    if have:
        for i, group in enumerate(groups):
            _line(axes[0], group, i, pair[0], f"{group.label}, easy group" if len(groups) == 1 else group.label, "-")
            _line(axes[0], group, i, pair[1], f"{group.label}, hard group" if len(groups) == 1 else "", "--")
        if len(groups) > 1:
            axes[0].set_title("group returns (easy solid, hard dashed)")
        _step_axis(axes[0])
    if gap:
        for i, group in enumerate(groups):
            _line(axes[-1], group, i, "groups/gap", "" if len(groups) == 1 else group.label)
        axes[-1].axhline(0, color=NEUTRAL, linewidth=0.8)
        _step_axis(axes[-1])
    shared_legend(figure, axes, at_least=1 if len(groups) > 1 else 2)
    return figure


def sources(groups: list[Group]) -> Drawn:
    """Mean score per data source: one run has its sources in one panel, several runs have a panel per source."""
    names = list(
        dict.fromkeys(
            n[len("source/") : -len("/score")] for g in groups for n in g.names() if n.startswith("source/") and n.endswith("/score")
        )
    )
    names = [n for n in names if any(g.band(f"source/{n}/score")[0] for g in groups)]
    if not names:
        return "no source/<name>/score"
    shown, rest = names[:MAX_SOURCES], names[MAX_SOURCES:]
    if len(groups) == 1:
        figure, axes = panels(["score by data source"])
        for i, name in enumerate(shown):
            _line(axes[0], groups[0], i, f"source/{name}/score", name)
    else:
        figure, axes = panels([visible(n) for n in shown], sharey=True)
        for axis, name in zip(axes, shown, strict=True):
            for i, group in enumerate(groups):
                _line(axis, group, i, f"source/{name}/score", group.label)
    for axis in axes:
        _step_axis(axis)
        axis.set_ylabel("score" if axis is axes[0] else "")
    shared_legend(figure, axes, at_least=1 if len(groups) > 1 else 2)
    if rest:
        figure.suptitle(f"{len(rest)} more not shown: {', '.join(rest)[:60]}", fontsize=7, color=NEUTRAL)
    return figure


def weights(groups: list[Group]) -> Drawn:
    """w_i: mean and the range from smallest to largest, a panel per run."""
    have = [(i, g) for i, g in enumerate(groups) if g.band("weights/min")[0] and g.band("weights/max")[0]][:MAX_SMALL]
    if not have:
        return "no weights/min, weights/max"
    figure, axes = panels([visible(g.label) for _, g in have], sharey=True)
    for axis, (i, group) in zip(axes, have, strict=True):
        steps, low, lowest, _ = group.band("weights/min")
        _, high, _, highest = group.band("weights/max")
        lower, upper = (lowest, highest) if len(group.runs) > 1 else (low, high)
        x, below = in_bins(steps, lower)
        axis.fill_between(x, below, in_bins(steps, upper)[1], color=colour(i), alpha=0.18, linewidth=0, label="smallest to largest")
        at, mean = in_bins(*group.band("weights/mean")[:2])
        axis.plot(at, mean, color=colour(i), label="mean")
        axis.axhline(1, color=NEUTRAL, linewidth=0.8, linestyle=":")
        _step_axis(axis)
    axes[0].set_ylabel("weight of a sequence")
    shared_legend(figure, axes)
    return figure


# --------------------------------------------------------------------------------------------- from samples.jsonl


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


FIGURES: dict[str, Callable[[list[Group]], Drawn]] = {
    "reward": reward,
    "reward_distribution": reward_distribution,
    "kl": kl,
    "group_returns": group_returns,
    "sources": sources,
    "weights": weights,
    "p_high": p_high,
    "explained_variance": explained_variance,
    "loss": loss,
    "accuracy": accuracy,
    "rollout": rollout,
}
