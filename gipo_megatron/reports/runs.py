"""Run folders, read back: metrics, samples, alerts, recipe and environment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gipo_megatron.errors import UserError, library_errors
from gipo_megatron.files import bad_line, read_jsonl
from gipo_megatron.typed import Mismatch, built

Points = tuple[list[int], list[float]]  # steps, values


@dataclass(frozen=True)
class RunFolder:
    """One run's files. `stage` and `headline` are the algorithm's, as the run recorded them."""

    path: Path
    name: str
    rows: list[dict[str, Any]]  # metrics.jsonl, by step
    samples: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] | None = None
    recipe_text: str = ""
    environment_text: str = ""
    stage: str = "–"
    headline: list[tuple[str, str]] = field(default_factory=list)  # metric, words

    @property
    def names(self) -> list[str]:
        """Return all metrics of the run, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))

    def series(self, metric: str) -> Points:
        """Return the steps where the metric is finite, and its values."""
        found = [(row["step"], float(row[metric])) for row in self.rows if finite(row.get(metric))]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, metric: str) -> float | None:
        values = self.series(metric)[1]
        return values[-1] if values else None

    @property
    def num_steps(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def seconds(self) -> float:
        return math.fsum(self.series("time/step_seconds")[1])


@dataclass(frozen=True)
class About:
    """The part of environment.json that an algorithm records for reports."""

    stage: str = "–"
    headline: list[tuple[str, str]] = field(default_factory=list)


def finite(value: Any) -> bool:
    """Check for a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def load_run(path: str | Path) -> RunFolder:
    """Read a run folder. Raises UserError: no such folder, no metrics.jsonl, an unreadable line,
    recipe or environment."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"no run folder {str(path)!r}", fix="give the folder a run wrote (recipe key run.dir)"
        )
    if not (folder / "metrics.jsonl").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            "no metrics.jsonl in the run folder",
            where=str(path),
            fix=f"it holds {found}; did the run finish its first step?",
        )
    recipe, recipe_text = _read_yaml(folder / "recipe.yaml")
    environment, environment_text = _read_yaml(folder / "environment.json")
    if recipe is not None and not isinstance(recipe, dict):
        raise UserError(
            "recipe.yaml is not a mapping",
            where=str(folder / "recipe.yaml"),
            fix="a run writes its expanded recipe there; remove the file to go without",
        )
    about = _about(folder / "environment.json", environment)
    return RunFolder(
        path=folder,
        name=folder.name if folder.name not in ("", "..") else folder.resolve().name,
        rows=read_rows(folder / "metrics.jsonl"),
        samples=read_rows(folder / "samples.jsonl"),
        held_out=read_rows(folder / "held_out.jsonl"),
        alerts=read_rows(folder / "alerts.jsonl"),
        recipe=recipe,
        recipe_text=recipe_text,
        environment_text=environment_text,
        stage=about.stage,
        headline=about.headline,
    )


def _about(file: Path, environment: Any) -> About:
    found = environment if isinstance(environment, dict) else {}
    try:
        return built(About, {key: found[key] for key in ("stage", "headline") if key in found})
    except Mismatch as mismatch:
        raise UserError(str(mismatch), where=str(file), fix="remove it to go without") from None


def _read_yaml(file: Path) -> tuple[Any, str]:
    """Return content and text of a YAML or JSON file; None and "" without the file."""
    if not file.is_file():
        return None, ""
    with library_errors(f"{file.name} is not YAML", where=str(file), fix="remove it to go without"):
        text = file.read_text(encoding="utf-8")
        return yaml.safe_load(text), text


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that a run appends to; none where there is no file.

    Raises UserError naming file and line for a line that is not an object with a step.
    """
    rows = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("step"), int):
            fix = "every line is one object with an integer `step`"
            raise bad_line(path, number, "no step", fix)
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------- seeds


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seed: one line with a band in a figure."""

    label: str
    runs: list[RunFolder]

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.names))

    def band(self, metric: str) -> tuple[list[int], list[float], list[float], list[float]]:
        """Return steps, mean, lowest and highest over the runs that have the metric, at the steps
        that all of them have."""
        curves = [dict(zip(*run.series(metric), strict=True)) for run in self.runs]
        curves = [curve for curve in curves if curve]
        if not curves:
            return [], [], [], []
        steps = sorted(set.intersection(*map(set, curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        means = [math.fsum(v) / len(v) for v in values]
        return steps, means, [min(v) for v in values], [max(v) for v in values]


def group_by_seed(runs: Sequence[RunFolder]) -> list[SeedGroup]:
    """Group the runs whose recipes are equal but for seeds, folders and loggers. A run without a
    recipe is alone. Order of first appearance."""
    groups: dict[str, list[RunFolder]] = {}
    for i, run in enumerate(runs):
        recipe = json.dumps(_without_seed(run.recipe), sort_keys=True, default=str)
        groups.setdefault(f"run {i}" if run.recipe is None else recipe, []).append(run)
    labels = [_label(members) for members in groups.values()]
    return [
        SeedGroup(
            f"{members[0].path.parent.name}/{label}" if labels.count(label) > 1 else label, members
        )
        for label, members in zip(labels, groups.values(), strict=True)
    ]


def _without_seed(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {
            k: _without_seed(v, k)
            for k, v in value.items()
            if k not in ("seed", "loggers") and (key, k) != ("run", "dir")
        }
    if isinstance(value, list):
        return [_without_seed(v) for v in value]
    if isinstance(value, str):
        # a chain of one seed loads from runs/sft_seed3
        return re.sub(r"seed[=_-]?\d+", "seed", value)
    return value


def _label(members: list[RunFolder]) -> str:
    if len(members) == 1:
        return members[0].name
    letters = zip(*(run.name for run in members), strict=False)
    common = "".join(column[0] for column in takewhile(lambda x: len(set(x)) == 1, letters))
    common = re.sub(r"[-_.,]?(run\.)?(seed)?[=_-]?$", "", common)
    # a sweep's folders are named by the seed alone
    return f"{common or members[0].path.resolve().parent.name} ({len(members)} seeds)"


def in_bins(steps: Sequence[int], values: Sequence[float], bins: int = 150) -> Points:
    """Return at most `bins` points, each the mean of its neighbours: a long run stays readable."""
    if len(steps) <= bins:
        return list(steps), list(values)
    edges = [round(i * len(steps) / bins) for i in range(bins)]
    sizes = np.diff([*edges, len(steps)])
    middles = [steps[edge + size // 2] for edge, size in zip(edges, sizes, strict=True)]
    return middles, (np.add.reduceat(values, edges) / sizes).tolist()
