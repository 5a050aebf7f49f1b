"""Run folders, read back (what they hold: README, design of the run folder)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from gipo_megatron.errors import UserError
from gipo_megatron.files import bad_line, read_jsonl

Points = tuple[list[int], list[float]]  # steps, values


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    name: str
    rows: list[dict[str, Any]]  # metrics.jsonl, by step
    samples: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] | None = None
    recipe_text: str = ""
    environment_text: str = ""

    @property
    def names(self) -> list[str]:
        """Every metric of the run, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))

    def series(self, metric: str) -> Points:
        """Where the metric is there and finite."""
        points = [
            (int(row["step"]), float(row[metric]))
            for row in self.rows
            if _is_number(row.get(metric))
        ]
        return [step for step, _ in points], [value for _, value in points]

    def first(self, metric: str) -> float | None:
        values = self.series(metric)[1]
        return values[0] if values else None

    def last(self, metric: str) -> float | None:
        values = self.series(metric)[1]
        return values[-1] if values else None

    @property
    def num_steps(self) -> int:
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def seconds(self) -> float:
        return math.fsum(self.series("time/step_seconds")[1])

    @property
    def stage(self) -> str:
        """SFT, RM, DPO, PPO or GIPO: by the recipe's components, else by what was logged."""
        if self.recipe is not None:
            algorithm = self.recipe["algorithm"]
            if algorithm["name"] == "ppo":
                return (
                    "GIPO"
                    if "variance_regulariser" in algorithm
                    and algorithm["variance_regulariser"]["name"] != "none"
                    else "PPO"
                )
            return {"reward_model": "RM"}.get(algorithm["name"], algorithm["name"].upper())
        for metric, stage in (
            ("reward/score_mean", "PPO"),
            ("rm/loss", "RM"),
            ("dpo/loss", "DPO"),
            ("sft/loss", "SFT"),
        ):
            if metric in self.names:
                return stage
        return "run"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def load_run(path: str | Path) -> Run:
    """Raises UserError: no such folder, no metrics.jsonl, an unreadable line or recipe."""
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
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
    environment = folder / "environment.json"
    return Run(
        path=folder,
        name=folder.name if folder.name not in ("", ".", "..") else folder.resolve().name,
        rows=read_rows(folder / "metrics.jsonl"),
        samples=read_rows(folder / "samples.jsonl"),
        alerts=read_rows(folder / "alerts.jsonl"),
        recipe=_parse(recipe, text),
        recipe_text=text,
        environment_text=environment.read_text(encoding="utf-8") if environment.is_file() else "",
    )


def _parse(path: Path, text: str) -> dict[str, Any] | None:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            "recipe.yaml is not YAML", where=str(path), fix=str(error).splitlines()[0]
        ) from None
    if recipe is not None and not (
        isinstance(recipe, dict)
        and isinstance(recipe.get("algorithm"), dict)
        and "name" in recipe["algorithm"]
    ):
        raise UserError(
            "recipe.yaml names no algorithm",
            where=str(path),
            fix="a run writes its expanded recipe there; remove the file to go without",
        )
    return recipe


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
class Group:
    """Runs that differ only in their seed (one run, where nothing else is like it)."""

    label: str
    runs: list[Run]

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.names))

    def band(self, metric: str) -> tuple[list[int], list[float], list[float], list[float]]:
        """Steps, mean, lowest and highest over the runs; steps that every run with the metric
        has."""
        curves = [
            dict(zip(*points, strict=True))
            for run in self.runs
            if (points := run.series(metric))[0]
        ]
        if not curves:
            return [], [], [], []
        steps = sorted(set.intersection(*(set(c) for c in curves)))
        values = [[c[s] for c in curves] for s in steps]
        return (
            steps,
            [math.fsum(v) / len(v) for v in values],
            [min(v) for v in values],
            [max(v) for v in values],
        )


def group_by_seed(runs: Sequence[Run]) -> list[Group]:
    """Runs whose recipes are equal but for seeds, folders and loggers, together; runs without a
    recipe alone. Order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for i, run in enumerate(runs):
        key = (
            f"run {i}"
            if run.recipe is None
            else json.dumps(_without_seed(run.recipe), sort_keys=True, default=str)
        )
        groups.setdefault(key, []).append(run)
    labels = [_label(members) for members in groups.values()]
    clash = {label for label in labels if labels.count(label) > 1}
    return [
        Group(f"{members[0].path.parent.name}/{label}" if label in clash else label, members)
        for label, members in zip(labels, groups.values(), strict=True)
    ]


def _without_seed(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        kept = {
            k: v
            for k, v in value.items()
            if k not in ("seed", "loggers") and (key, k) != ("run", "dir")
        }
        return {k: _without_seed(v, k) for k, v in kept.items()}
    if isinstance(value, list):
        return [_without_seed(v) for v in value]
    if isinstance(value, str):
        # a chain of one seed: loads from runs/sft_seed3
        return re.sub(r"seed[=_-]?\d+", "seed", value)
    return value


def _label(members: list[Run]) -> str:
    if len(members) == 1:
        return members[0].name
    common = members[0].name
    for run in members[1:]:
        while not run.name.startswith(common):
            common = common[:-1]
    common = re.sub(r"[-_.,]?(run\.)?(seed)?[=_-]?$", "", common)
    # a sweep's folders are called by the seed alone
    named = common or members[0].path.resolve().parent.name
    return f"{named} ({len(members)} seeds)"


def in_bins(steps: Sequence[int], values: Sequence[float], bins: int = 150) -> Points:
    """At most `bins` points, each the mean of its neighbours: a long run stays readable."""
    if len(steps) <= bins:
        return list(steps), list(values)
    edges = [round(i * len(steps) / bins) for i in range(bins + 1)]
    parts = [(steps[a:b], values[a:b]) for a, b in pairwise(edges)]
    return [s[len(s) // 2] for s, _ in parts], [math.fsum(v) / len(v) for _, v in parts]
