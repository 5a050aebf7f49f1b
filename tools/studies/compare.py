"""Comparisons of S2 with PPO with KL: at equal KL, at equal price, at each system's best price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tools.studies.cells import WORLDS, Cell, etas_of
from tools.studies.inference import holm, interval, sign_flip

CLAIMED = ("worse", "mean")  # gold of the worse half, and of both
BASELINE = "ppo_kl"
MARGIN = 0.02  # the mean may be lower by less than this
# system and at what it is compared, in each world: written before the run (docs/studies/s2.md)
REGISTERED = (
    ("gipo_head", "kl"),
    ("gipo_value", "kl"),
    ("gipo_both", "kl"),
    ("adaptive", "price"),
)


def last(cell: Cell) -> dict[str, np.ndarray]:
    """Return gold's outcomes, KL and price at the end of training, one number per seed each."""
    end = {name: np.array(rows[-1]) for name, rows in cell.trace.items()}
    easy, hard = end["gold_easy"], end["gold_hard"]
    return {
        "easy": easy,
        "hard": hard,
        "mean": (easy + hard) / 2,
        "worse": np.minimum(easy, hard),
        "gap": easy - hard,
        "kl": (end["kl_easy"] + end["kl_hard"]) / 2,
        "price": end["price"],
    }


@dataclass(frozen=True)
class Difference:
    """One number per seed, system minus baseline, and the η that could be compared."""

    values: np.ndarray
    etas: list[float]

    def text(self) -> str:
        low, high = interval(self.values)
        return f"{self.values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


@dataclass(frozen=True)
class WorldCells:
    """All cells of one world; `of[system][eta]` are outcomes."""

    name: str
    of: dict[str, dict[float, dict[str, np.ndarray]]]

    @cached_property
    def curve(self) -> dict[str, np.ndarray]:
        """Return each outcome of PPO with KL as [etas, seeds], by η; PPO is the point at η 0."""
        points = {**self.of["ppo"], **self.of[BASELINE]}
        ordered = [points[eta] for eta in sorted(points)]
        return {name: np.stack([p[name] for p in ordered]) for name in ordered[0]}

    def difference(self, system: str, outcome: str, at: str) -> Difference | None:
        """Return the mean over η of system - curve, interpolated at equal `at` (kl or price) for
        each seed; None if every η lies outside of the curve of a seed."""
        kept = {}
        for eta, cell in sorted(self.of[system].items()):
            x, points = cell[at], self.curve[at]
            if at == "price":  # on log η, which PPO's 0 is no part of
                x, points = np.log(x), np.log(points[1:])
            y = self.curve[outcome][-len(points) :]
            expected = [_interpolated(x[s], points[:, s], y[:, s]) for s in range(len(x))]
            if np.isfinite(expected).all():
                kept[eta] = cell[outcome] - expected
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


def _interpolated(x: float, points: np.ndarray, y: np.ndarray) -> float:
    """Return y at x on the lines between the points; NaN outside of them."""
    order = np.argsort(points)
    return float(np.interp(x, points[order], y[order], left=np.nan, right=np.nan))


def by_world(cells: Sequence[Cell]) -> list[WorldCells]:
    """Return the worlds whose curve is complete."""
    worlds = {spec.name: WorldCells(spec.name, {}) for spec in WORLDS}
    for cell in cells:
        worlds[cell.world].of.setdefault(cell.system, {})[cell.eta] = last(cell)
    whole = {"ppo": etas_of("ppo"), BASELINE: etas_of(BASELINE)}
    return [
        world
        for world in worlds.values()
        if all(set(etas) <= set(world.of.get(system, {})) for system, etas in whole.items())
    ]


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
        if interval(self.worse.values)[0] <= 0:
            reasons.append("the worse group's lower bound is not above 0")
        elif self.p >= 0.05:
            reasons.append("p after Holm is not below 0.05")
        if interval(self.mean.values)[0] <= -MARGIN:
            reasons.append(f"the mean's lower bound is not above −{MARGIN:g}")
        return f"not shown: {'; '.join(reasons)}" if reasons else "shown"


def findings(worlds: Sequence[WorldCells]) -> list[Finding]:
    """Return the pre-registered comparisons. One that could not be made counts in Holm's number of
    comparisons, with p = 1."""
    of = {world.name: world for world in worlds}
    names = [(spec.name, *comparison) for spec in WORLDS for comparison in REGISTERED]
    ran = [name in of and system in of[name].of for name, system, _ in names]
    pairs = [
        tuple(of[name].difference(system, outcome, at) if done else None for outcome in CLAIMED)
        for (name, system, at), done in zip(names, ran, strict=True)
    ]
    adjusted = holm([1.0 if worse is None else sign_flip(worse.values) for worse, _ in pairs])
    return [
        Finding(done, *name, worse, mean, None if worse is None else p)
        for done, name, (worse, mean), p in zip(ran, names, pairs, adjusted, strict=True)
    ]
