"""Comparisons with PPO with KL: at equal KL, at equal price, at each system's best price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tools.studies.inference import holm, interval

CLAIMED = ("worse", "mean")  # gold of the worse half, and of both
BASELINE = "ppo_kl"
MARGIN = 0.02  # the mean may be lower by less than this
ALPHA = 0.05  # "shown" needs a p after Holm below this
LOWER = ("gap", "decline", "questions")  # outcomes of which less is better


@dataclass(frozen=True)
class Difference:
    """One number per seed, system minus baseline, and the η that could be compared."""

    values: np.ndarray
    etas: list[float]

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.values)

    def text(self) -> str:
        low, high = self.interval
        return f"{self.values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


@dataclass(frozen=True)
class WorldCells:
    """All cells of one world; `of[system][eta]` are outcomes, a number per seed each."""

    name: str
    of: dict[str, dict[float, dict[str, np.ndarray]]]
    etas: Sequence[float]  # of the differences; the curve of PPO with KL may have more

    @cached_property
    def points(self) -> dict[float, dict[str, np.ndarray]]:
        """Return the outcomes of PPO with KL by η; PPO, where there is one, is the point at η 0."""
        return dict(sorted({**self.of.get("ppo", {}), **self.of[BASELINE]}.items()))

    def expected(self, system: str, eta: float, outcome: str, at: str) -> np.ndarray:
        """Return, for each seed, the outcome of PPO with KL at equal `at` (kl, or price on log η);
        NaN outside of the curve. PPO with KL itself is compared without its own point."""
        known = [
            point
            for other, point in self.points.items()
            if (at == "kl" or other > 0) and (system != BASELINE or other != eta)
        ]
        scale = np.log if at == "price" else np.asarray
        curve = scale(np.stack([point[at] for point in known]))  # [η, seeds], as y
        y = np.stack([point[outcome] for point in known])
        x = scale(self.of[system][eta][at])
        sign = -1 if outcome in LOWER else 1
        best = [highest(x[s], curve[:, s], sign * y[:, s]) for s in range(len(x))]
        return sign * np.array(best)

    def difference(self, system: str, outcome: str, at: str) -> Difference | None:
        """Return the mean over the η of all systems of system - PPO with KL; None if every η lies
        outside of the curve of a seed."""
        kept = {}
        for eta in (eta for eta in self.etas if eta in self.of[system]):
            found = self.of[system][eta][outcome] - self.expected(system, eta, outcome, at)
            if np.isfinite(found).all():
                kept[eta] = found
        if not kept:
            return None
        return Difference(np.mean(list(kept.values()), axis=0), list(kept))

    def best(self, system: str) -> tuple[dict[str, np.ndarray], list[float]]:
        """Return the outcomes of each seed at the η of the highest mean gold over the other half of
        the seeds, and that η for each half."""
        cells = self.of[system]
        seeds = np.arange(len(next(iter(cells.values()))["mean"]))
        first = seeds < (len(seeds) + 1) // 2
        chosen = [
            max(sorted(cells), key=lambda eta: float(cells[eta]["mean"][~half].mean()))
            for half in (first, ~first)
        ]
        a, b = (cells[eta] for eta in chosen)
        return {name: np.where(first, a[name], b[name]) for name in a}, chosen


def highest(x: float, points: np.ndarray, y: np.ndarray) -> float:
    """Return the highest y at x on the lines from each point to the next; NaN where none passes.

    At low η the KL of PPO with KL turns back, so that several η have one KL; y is gold, or what
    else should be high, so the highest is the strictest choice.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (x - points[:-1]) / np.diff(points)
    passes = (share >= 0) & (share <= 1)
    values = (y[:-1] + share * np.diff(y))[passes]
    return float(values.max()) if len(values) else np.nan


@dataclass(frozen=True)
class Rule:
    """The comparisons that were registered before the run, and what decides them."""

    comparisons: Sequence[tuple[str, str, str]]  # world, system, at what it is compared
    p_value: Callable[[np.ndarray, np.ndarray], float]  # of the differences: worse group, mean


@dataclass(frozen=True)
class Finding:
    """One pre-registered comparison; p is None where nothing could be compared."""

    ran: bool
    world: str
    system: str
    at: str
    worse: Difference | None
    mean: Difference | None
    p: float | None  # after Holm

    @property
    def verdict(self) -> str:
        if not self.ran:
            return "not shown: not run yet"
        if self.worse is None or self.mean is None or self.p is None:
            return "not shown: outside of the curve"
        reasons = []
        if self.worse.interval[0] <= 0:
            reasons.append("the worse group's lower bound is not above 0")
        elif self.p >= ALPHA:
            reasons.append(f"p after Holm is not below {ALPHA:g}")
        if self.mean.interval[0] <= -MARGIN:
            reasons.append(f"the mean's lower bound is not above −{MARGIN:g}")
        return f"not shown: {'; '.join(reasons)}" if reasons else "shown"


def findings(worlds: Sequence[WorldCells], rule: Rule) -> list[Finding]:
    """Return the pre-registered comparisons. One that could not be made counts in Holm's number of
    comparisons, with p = 1."""
    of = {world.name: world for world in worlds}
    ran = [name in of and system in of[name].of for name, system, _ in rule.comparisons]
    pairs = [
        [of[name].difference(system, outcome, at) if done else None for outcome in CLAIMED]
        for (name, system, at), done in zip(rule.comparisons, ran, strict=True)
    ]
    adjusted = holm([1.0 if not (a and b) else rule.p_value(a.values, b.values) for a, b in pairs])
    return [
        Finding(done, *name, worse, mean, None if worse is None else p)
        for done, name, (worse, mean), p in zip(ran, rule.comparisons, pairs, adjusted, strict=True)
    ]
