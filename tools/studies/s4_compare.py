"""Comparisons of S4 with PPO with KL at equal KL: paired over test prompts, and over seeds.

A resample draws prompts with replacement, the same for all systems, and seeds with replacement,
independently of the prompts (Owen 2007). Row 0 of all arrays [R] is the sample itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from gipo_megatron.evaluation import statistics
from gipo_megatron.evaluation.judges.reward_model import RewardModelJudge
from gipo_megatron.evaluation.types import Comparison, Pair
from tools.studies.compare import MARGIN
from tools.studies.inference import holm
from tools.studies.s4_cells import (
    AGAIN,
    BASELINE,
    CELLS,
    MIDDLE,
    REGISTERED,
    START,
    Cell,
    array,
)

RESAMPLES = 2000
PROMPTS = 300  # below, nothing is shown
SOURCES, DIFFICULTY = "sources", "difficulty"
Measure = Callable[[Cell], np.ndarray]  # [R]


@dataclass(frozen=True)
class Difference:
    """System minus PPO with KL. value: the mean over seeds; resampled [R]."""

    value: float
    resampled: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % percentile interval."""
        low, high = np.percentile(self.resampled, [2.5, 97.5])
        return float(low), float(high)

    @property
    def p(self) -> float:
        """Return the one-sided p-value of "not above 0"."""
        return float((1 + (self.resampled <= 0).sum()) / (1 + len(self.resampled)))

    def text(self) -> str:
        low, high = self.interval
        return f"{self.value:+.3f} [{low:+.3f}, {high:+.3f}]"


class Study:
    """The cells of all seeds that have responses of the start."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.of = {cell.key: cell for cell in cells}
        self._shares: dict[tuple[int, str, str], np.ndarray] = {}
        self.seeds = sorted({seed for seed, system, _ in self.of if system == AGAIN})

    @property
    def complete(self) -> list[int]:
        """Return the seeds that have every registered system and the whole curve."""
        return [s for s in self.seeds if all((s, *cell) in self.of for cell in CELLS)]

    @cached_property
    def counts(self) -> np.ndarray:
        """Return how often each prompt is drawn [1 + RESAMPLES, P]."""
        prompts = len(self.of[self.seeds[0], START, 0.0].prompts)
        generator = np.random.default_rng(0)
        drawn = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
        return np.concatenate([np.ones((1, prompts)), drawn])

    # ------------------------------------------------------------------------------------ measures

    def groups(self, seed: int, kind: str) -> dict[str, np.ndarray]:
        """Return {name: bool [P]}. Difficulty: the half of the prompts where responses of the start
        that nothing else uses have less gold, and the other half."""
        again = self.of[seed, AGAIN, 0.0]
        if kind == DIFFICULTY:
            order = np.argsort(array(again.gold), kind="stable")
            hard = np.isin(np.arange(len(order)), order[: (len(order) + 1) // 2])
            return {"hard": hard, "easy": ~hard}
        names = sorted(set(again.source))
        return {name: np.array([s == name for s in again.source]) for name in names}

    def shares(self, seed: int, kind: str, group: str) -> np.ndarray:
        """Return the share of each prompt in the mean of a resample, of a group or of all prompts
        (kind and group ""), [R, P]. Where none of a group was drawn, all of it counts."""
        key = seed, kind, group
        if key not in self._shares:
            rows = self.groups(seed, kind)[group] if kind else np.ones(self.counts.shape[1])
            counts = self.counts * rows
            counts = np.where(counts.any(1, keepdims=True), counts, rows)
            self._shares[key] = counts / counts.sum(1, keepdims=True)
        return self._shares[key]

    def mean(self, cell: Cell, kind: str = "", group: str = "") -> np.ndarray:
        """Return the mean gold over the drawn prompts, of a group or of all, [R]."""
        found: np.ndarray = self.shares(cell.seed, kind, group) @ array(cell.gold)
        return found

    def kl(self, cell: Cell) -> np.ndarray:
        found: np.ndarray = self.shares(cell.seed, "", "") @ array(cell.kl)
        return found

    def worse(self, cell: Cell, kind: str) -> np.ndarray:
        """Return the mean gold of the group where it is lowest, [R]."""
        groups = self.groups(cell.seed, kind)
        worst: np.ndarray = np.min([self.mean(cell, kind, group) for group in groups], axis=0)
        return worst

    # --------------------------------------------------------------------------------- comparisons

    def curve(self, seed: int) -> list[Cell]:
        """Return the start and PPO with KL from the highest price to the lowest: from no KL to the
        most."""
        etas = sorted((e for s, name, e in self.of if (s, name) == (seed, BASELINE)), reverse=True)
        return [self.of[seed, START, 0.0], *(self.of[seed, BASELINE, eta] for eta in etas)]

    def difference(self, system: str, measure: Measure) -> Difference | None:
        """Return system - PPO with KL at equal KL, over the complete seeds, or over all while
        none is complete; None where none has the system, or one's KL is outside of its curve.

        Resampled KL just outside of the resampled curve counts at the curve's end.
        """
        chosen = self.complete or self.seeds
        seeds = [seed for seed in chosen if (seed, system, MIDDLE) in self.of]
        found = [self._of_a_seed(self.of[seed, system, MIDDLE], measure) for seed in seeds]
        if not found or any(np.isnan(x[0]) for x in found):
            return None
        table = np.stack(found, 1)  # [R, seeds]
        drawn = np.random.default_rng(1).integers(len(seeds), size=(RESAMPLES, len(seeds)))
        return Difference(
            float(table[0].mean()), np.take_along_axis(table[1:], drawn, axis=1).mean(1)
        )

    def _of_a_seed(self, cell: Cell, measure: Measure) -> np.ndarray:
        points = self.curve(cell.seed)
        x, y = self.kl(cell), measure(cell)
        curve = np.stack([self.kl(point) for point in points], 1)  # [R, points]
        gold = np.stack([measure(point) for point in points], 1)
        inside = np.clip(x, curve.min(1), curve.max(1))
        inside[0] = x[0]
        return y - highest(inside, curve, gold)

    def against_baseline(self, cell: Cell) -> dict[str, Any] | None:
        """Return wins, ties, losses, their intervals and the length-controlled rate against PPO
        with KL of the same seed and η; the higher gold wins."""
        other = self.of.get((cell.seed, BASELINE, cell.eta))
        if other is None or cell.system == BASELINE:
            return None
        judge = RewardModelJudge()
        mine, theirs = (dict(zip(c.prompts, c.gold, strict=True)) for c in (cell, other))

        def pair(prompt: str, first: float, second: float) -> Pair:
            scores = {"first_score": first, "second_score": second}
            return Pair("test", "helpful", prompt, "", "", "", scores)

        first = judge.judge([pair(p, mine[p], theirs[p]) for p in mine], lambda n: None)
        second = judge.judge([pair(p, theirs[p], mine[p]) for p in mine], lambda n: None)
        comparisons = [
            Comparison("test", BASELINE, prompt, source, one, two, mine_tokens, other_tokens)
            for prompt, source, one, two, mine_tokens, other_tokens in zip(
                cell.prompts, cell.source, first, second, cell.tokens, other.tokens, strict=True
            )
            if one is not None and two is not None
        ]
        return statistics.compare(comparisons, resamples=RESAMPLES, seed=0)


def highest(x: np.ndarray, points: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the highest y at x [R] on the lines from each point to the next, NaN where none is:
    compare.highest for R curves at once, points and y being [R, points].
    """
    width = np.diff(points)
    share = (x[:, None] - points[:, :-1]) / np.where(width == 0, np.nan, width)
    values = y[:, :-1] + share * np.diff(y)
    passes = (share >= 0) & (share <= 1)
    found: np.ndarray = np.where(passes, values, -np.inf).max(1)
    return np.where(np.isfinite(found), found, np.nan)


@dataclass(frozen=True)
class Finding:
    """One pre-registered comparison; p after Holm."""

    system: str
    kind: str
    seeds: int  # complete ones
    prompts: int
    worse: Difference | None
    mean: Difference | None
    p: float

    def verdict(self, needed: int) -> str:
        """Return "shown", or the reasons why not; `needed`: least number of complete seeds."""
        if self.worse is None or self.mean is None:
            return "not shown: not run, or outside of the curve"
        reasons = []
        if self.seeds < needed:
            reasons.append(f"{self.seeds} of {needed} seeds")
        if self.prompts < PROMPTS:
            reasons.append(f"{self.prompts} of {PROMPTS} test prompts")
        if self.worse.interval[0] <= 0:
            reasons.append("the worse group's lower bound is not above 0")
        elif self.p >= 0.05:
            reasons.append("p after Holm is not below 0.05")
        if self.mean.interval[0] <= -MARGIN:
            reasons.append(f"the mean's lower bound is not above −{MARGIN:g}")
        return f"not shown: {'; '.join(reasons)}" if reasons else "shown"


def findings(study: Study) -> list[Finding]:
    """Return the pre-registered comparisons. One that cannot be made counts with p = 1."""
    names = [(system, kind) for system in REGISTERED for kind in (SOURCES, DIFFICULTY)]
    worse = [study.difference(s, partial(study.worse, kind=kind)) for s, kind in names]
    mean = {system: study.difference(system, study.mean) for system in REGISTERED}
    adjusted = holm([1.0 if found is None else found.p for found in worse])
    seeds, prompts = len(study.complete), study.counts.shape[1]
    return [
        Finding(system, kind, seeds, prompts, found, mean[system], p)
        for (system, kind), found, p in zip(names, worse, adjusted, strict=True)
    ]
