"""Figures of single responses, from samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gipo_megatron.reports.runs import SeedGroup
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
from gipo_megatron.statistics import correlation

MAX_POINTS = 1500  # of a scatter
TAIL = 0.1  # of the responses, in CVaR


def _fifth(group: SeedGroup, keys: tuple[str, ...], *, first: bool = False) -> np.ndarray:
    """Return [N, len(keys)]: samples with all `keys`, of the last (first) fifth of the steps."""
    found = []
    for run in group.runs:
        rows = [r for r in run.samples if all(isinstance(r.get(k), (int, float)) for k in keys)]
        steps = sorted({row["step"] for row in rows})
        size = max(1, len(steps) // 5)
        wanted = set(steps[:size] if first else steps[-size:])
        found += [[float(row[k]) for k in keys] for row in rows if row["step"] in wanted]
    return np.array(found, dtype=float).reshape(-1, len(keys))


# -------------------------------------------------------------------------------------------- tails


@dataclass(frozen=True)
class Tails:
    """Shape of a sample of scores. Skew and excess kurtosis are 0 for a Gaussian, None where all
    scores are equal; cvar: mean of the lowest 10 %, the response on its edge counted in part."""

    count: int
    mean: float
    std: float
    skew: float | None
    kurtosis: float | None
    cvar: float

    def __str__(self) -> str:
        skew, kurtosis = ("–" if x is None else f"{x:+.2f}" for x in (self.skew, self.kurtosis))
        return f"skew {skew}, kurt {kurtosis}, CVaR₁₀ {self.cvar:+.2f}"


def tails(values: Sequence[float] | np.ndarray) -> Tails:
    """Raises ValueError for no values."""
    from scipy import stats  # slow to import

    x = np.sort(np.asarray(values, dtype=float))
    if not len(x):
        raise ValueError("tails of no scores")
    mean, std = float(x.mean()), float(x.std())
    varies = std > 1e-12 * max(1.0, abs(mean))
    # 1 for each response inside the tail, a fraction for the one on its edge
    weight = np.clip(TAIL * len(x) - np.arange(len(x)), 0, 1)
    return Tails(
        count=len(x),
        mean=mean,
        std=std,
        skew=float(stats.skew(x)) if varies else None,
        kurtosis=float(stats.kurtosis(x)) if varies else None,
        cvar=float((weight * x).sum() / weight.sum()),
    )


# ------------------------------------------------------------------------------------------ figures


def p_high(groups: list[SeedGroup]) -> Drawn:
    """Draw p(high group) against score and length at the end of training, a row per run."""
    return scatter_p_high([(g.label, _fifth(g, ("p_high", "score", "length"))) for g in groups])


def scatter_p_high(systems: Sequence[tuple[str, np.ndarray]]) -> Drawn:
    """Draw a row for each system whose p_high varies. systems: label, [N, 3] of p_high, score and
    length in tokens."""
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
        for k, quantity in ((1, "score"), (2, "length")):
            r = correlation(points[:, k], points[:, 0])
            shown = "r undefined" if r is None else f"r = {r:+.2f}"
            titles.append(f"{name}against {quantity}, {shown}")
    figure, axes = panels(titles, sharey=True)
    for row, (i, _, points) in enumerate(found):
        thinned = points[:: -(-len(points) // MAX_POINTS)]
        look: dict[str, Any] = {"s": 7, "color": colour(i), "alpha": 0.45, "linewidths": 0}
        for k, label in ((1, "score"), (2, "response length (tokens)")):
            axis = axes[2 * row + k - 1]
            axis.scatter(thinned[:, k], thinned[:, 0], **look)
            axis.set_xlabel(label)
            axis.set_ylim(-0.03, 1.03)
        axes[2 * row + 1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[2 * row].set_ylabel("p(high group)")
    return figure


def score_bins(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the edges for histograms of all parts, without the rarest outliers. Their number grows
    with the smallest part."""
    everything = np.concatenate(list(parts))
    low, high = np.quantile(everything, (0.002, 0.998))
    span = max(high - low, 1e-6)
    return np.linspace(
        low - 0.02 * span,
        high + 0.02 * span,
        1 + min(30, max(8, round(min(len(part) for part in parts) ** 0.5))),
    )


def reward_distribution(groups: list[SeedGroup]) -> Drawn:
    """Draw histograms of scores, the same bins in a panel per run: the first fifth of the steps in
    grey, the last fifth in colour, and their tails."""
    found = [
        (i, g, _fifth(g, ("score",), first=True)[:, 0], _fifth(g, ("score",))[:, 0])
        for i, g in enumerate(groups)
    ]
    found = [f for f in found if len(f[2]) and len(f[3])][:MAX_SMALL]
    if not found:
        return "no samples with a score"
    bins = score_bins([part for _, _, start, end in found for part in (start, end)])
    figure, axes = panels([visible(g.label) for _, g, _, _ in found], sharey=True, sharex=True)
    for axis, (i, _, start, end) in zip(axes, found, strict=True):
        _histogram(axis, start, bins, NEUTRAL, 0.3, "--", "start of the run (grey)")
        _histogram(axis, end, bins, colour(i), 0.5, "-", "end of the run")
        axis.set_xlabel("score")
        axis.tick_params(labelbottom=True)
        _note(axis, f"start: {tails(start)}", NEUTRAL, 0)
        _note(axis, f"end: {tails(end)}", colour(i), 1)
    axes[0].set_ylim(0, axes[0].get_ylim()[1] * 1.3)  # room for the notes
    axes[0].set_ylabel("share of responses")
    shared_legend(figure, axes)
    return figure


def _histogram(
    axis: Axes,
    values: np.ndarray,
    bins: np.ndarray,
    ink: str,
    alpha: float,
    line: str,
    label: str,
) -> None:
    """Draw shares and the mean. Outliers are counted in the outermost bins."""
    clipped = np.clip(values, bins[0], bins[-1])
    share = np.full(len(values), 1 / len(values))
    axis.hist(clipped, bins.tolist(), weights=share, color=ink, alpha=alpha, label=label)
    axis.axvline(values.mean(), color=ink, linewidth=1.2, linestyle=line, ymax=0.77)


def _note(axis: Axes, text: str, ink: str, line: int) -> None:
    """Write a line of small print in the upper left corner."""
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
