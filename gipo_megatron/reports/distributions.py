"""Figures of single responses, from samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gipo_megatron.reports.runs import Group
from gipo_megatron.reports.style import (
    MAX_SMALL,
    NEUTRAL,
    SMALLEST,
    Drawn,
    colour,
    panels,
    shared_legend,
    visible,
)

MAX_POINTS = 1500  # of a scatter
TAIL = 0.1  # of the responses, in CVaR


def _part(group: Group, keys: tuple[str, ...], part: str) -> np.ndarray:
    """[N, len(keys)] of the samples that have them all: of all steps, or of the first or last fifth
    of the steps."""
    rows = []
    for run in group.runs:
        there = [
            row for row in run.samples if all(isinstance(row.get(k), (int, float)) for k in keys)
        ]
        steps = sorted({row["step"] for row in there})
        fifth = max(1, len(steps) // 5)
        wanted = set({"all": steps, "start": steps[:fifth], "end": steps[-fifth:]}[part])
        rows += [[float(row[k]) for k in keys] for row in there if row["step"] in wanted]
    return np.array(rows, dtype=float).reshape(-1, len(keys))


# -------------------------------------------------------------------------------------------- tails


@dataclass(frozen=True)
class Tails:
    """Shape of a sample of scores. skew = m₃/m₂^1.5 and kurtosis = m₄/m₂² − 3 (both 0 for a
    Gaussian; m_k central moments, None where all are equal); cvar: mean of the lowest 10 %, the
    response on its edge counted in part."""

    count: int
    mean: float
    std: float
    skew: float | None
    kurtosis: float | None
    cvar: float

    def __str__(self) -> str:
        shape = [
            f"{name} {value:+.2f}" if value is not None else f"{name} –"
            for name, value in (("skew", self.skew), ("kurt", self.kurtosis))
        ]
        return f"{', '.join(shape)}, CVaR₁₀ {self.cvar:+.2f}"


def tails(values: Sequence[float] | np.ndarray) -> Tails:
    """Raises ValueError for no values."""
    x = np.sort(np.asarray(values, dtype=float))
    if not len(x):
        raise ValueError("tails of no scores")
    centred = x - x.mean()
    m2, m3, m4 = (float((centred**k).mean()) for k in (2, 3, 4))
    spread = m2 > (1e-12 * max(1.0, abs(float(x.mean())))) ** 2
    # 1 for each response inside the tail, a fraction for the one on its edge
    weight = np.clip(TAIL * len(x) - np.arange(len(x)), 0, 1)
    return Tails(
        count=len(x),
        mean=float(x.mean()),
        std=m2**0.5,
        skew=m3 / m2**1.5 if spread else None,
        kurtosis=m4 / m2**2 - 3 if spread else None,
        cvar=float((weight * x).sum() / weight.sum()),
    )


# ------------------------------------------------------------------------------------------ figures


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    if len(x) < 3 or x.std() < 1e-12 or y.std() < 1e-12:
        return "r undefined"
    return f"r = {np.corrcoef(x, y)[0, 1]:+.2f}"


def p_high(groups: list[Group]) -> Drawn:
    """p(high group) against score and against length, end of training: a row per run. What it
    follows is what the groups mean."""
    return scatter_p_high(
        [(g.label, _part(g, ("p_high", "score", "length"), "end")) for g in groups]
    )


def scatter_p_high(systems: Sequence[tuple[str, np.ndarray]]) -> Drawn:
    """systems: label, [N, 3] of p_high, score and length in tokens; a row each, those whose p_high
    varies."""
    found = [
        (i, label, points)
        for i, (label, points) in enumerate(systems)
        if len(points) and np.ptp(points[:, 0]) > 0
    ][:MAX_SMALL]
    if not found:
        return "no samples with p_high (varying), score and length"
    titles = []
    for _, system, points in found:
        name = f"{system}: " if len(found) > 1 else "p(high group) "
        titles += [
            f"{name}against {what}, {_correlation(points[:, k], points[:, 0])}"
            for k, what in ((1, "score"), (2, "length"))
        ]
    figure, axes = panels(titles, sharey=True)
    for row, (i, _, points) in enumerate(found):
        thinned = points[:: -(-len(points) // MAX_POINTS)]
        for k, label in ((1, "score"), (2, "response length (tokens)")):
            axis = axes[2 * row + k - 1]
            axis.scatter(
                thinned[:, k], thinned[:, 0], s=7, color=colour(i), alpha=0.45, linewidths=0
            )
            axis.set_xlabel(label)
            axis.set_ylabel("p(high group)" if k == 1 else "")
            axis.set_ylim(-0.03, 1.03)
    return figure


def score_bins(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Edges for histograms of all parts beside each other, without the rarest outliers; as many as
    the smallest part bears."""
    everything = np.concatenate(list(parts))
    low, high = np.quantile(everything, (0.002, 0.998))
    span = max(high - low, 1e-6)
    return np.linspace(
        low - 0.02 * span,
        high + 0.02 * span,
        1 + min(30, max(8, round(min(len(part) for part in parts) ** 0.5))),
    )


def reward_distribution(groups: list[Group]) -> Drawn:
    """Histogram of scores: the first fifth of the steps in grey, the last fifth in colour, a panel
    per run, the same bins; their tails."""
    found = [
        (i, g, _part(g, ("score",), "start")[:, 0], _part(g, ("score",), "end")[:, 0])
        for i, g in enumerate(groups)
    ]
    found = [f for f in found if len(f[2]) and len(f[3])][:MAX_SMALL]
    if not found:
        return "no samples with a score"
    bins = score_bins([part for _, _, start, end in found for part in (start, end)])
    figure, axes = panels([visible(g.label) for _, g, _, _ in found], sharey=True, sharex=True)
    for axis, (i, _, start, end) in zip(axes, found, strict=True):
        for values, fill, label in (
            (start, NEUTRAL, "start of the run (grey)"),
            (end, colour(i), "end of the run"),
        ):
            share = np.full(len(values), 1 / len(values))
            # rare outliers are counted in the outermost bins
            clipped = np.clip(values, bins[0], bins[-1])
            axis.hist(
                clipped,
                bins.tolist(),
                weights=share,
                color=fill,
                alpha=0.3 if values is start else 0.5,
                label=label,
            )
            axis.axvline(
                values.mean(), color=fill, linewidth=1.2, linestyle="--" if values is start else "-"
            )
        axis.set_xlabel("score")
        axis.tick_params(labelbottom=True)
    for axis, (i, _, start, end) in zip(axes, found, strict=True):
        _note(axis, f"start: {tails(start)}", NEUTRAL, 0)
        _note(axis, f"end: {tails(end)}", colour(i), 1)
    axes[0].set_ylim(0, axes[0].get_ylim()[1] * 1.3)  # room for the notes
    axes[0].set_ylabel("share of responses")
    shared_legend(figure, axes)
    return figure


def _note(axis: Axes, text: str, ink: str, line: int) -> None:
    """A line of small print in the upper left corner."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.annotate(
        text,
        (0, 1),
        (3, -2 - 9 * line),
        "axes fraction",
        "offset points",
        va="top",
        fontsize=SMALLEST,
        color=ink,
        bbox=paper,
    )
