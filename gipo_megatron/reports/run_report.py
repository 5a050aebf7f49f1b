"""One file that shows a run, or several beside each other: report.html opens anywhere and asks no
network for anything."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from gipo_megatron.files import write_text
from gipo_megatron.reports.figures import draw, rendered, save
from gipo_megatron.reports.pages import number, printable
from gipo_megatron.reports.run_page import PAGE
from gipo_megatron.reports.runs import Run, load_run
from gipo_megatron.statistics import wilson_interval
from gipo_megatron.telemetry.console import duration

SAMPLES = 4  # rows shown of a run's first and of its last sampled step
SAMPLE_COLUMNS = ("source", "score", "p_high", "weight", "kl", "length")

CAPTIONS = {
    "reward": (
        "Reward model's score on training and held-out prompts; gold reward where the data knows"
        " it. A score that rises while gold falls is reward hacking."
    ),
    "reward_distribution": (
        "Scores of sampled responses in the first and the last fifth of the steps; lines mark the"
        " means. Skew and kurtosis (excess) are 0 for a Gaussian; CVaR₁₀ is the mean of the lowest"
        " tenth."
    ),
    "kl": "Distance from the reference policy, and what a nat of it costs.",
    "frontier": (
        "Reward against the root of the KL to the reference, over training: what distance from the"
        " reference buys."
    ),
    "group_returns": (
        "Mean return of the high-scoring (easy) and the low-scoring (hard) group, and the gap. "
        "A gap that closes because the high group falls is levelling down."
    ),
    "sources": "Mean score by data source.",
    "gold_by_source": (
        "What the responses are really worth, by data source: held-out prompts, gold reward."
    ),
    "weights": "Weight of a sequence in the policy's update.",
    "p_high": (
        "Probability of the high-scoring group against what it should not merely copy; last fifth"
        " of the steps."
    ),
    "explained_variance": "Share of the returns' variance that the critic explains.",
    "loss": "Losses.",
    "accuracy": "Share of pairs where the chosen response is preferred.",
    "rollout": "Length of the responses and how many hit the limit.",
}

# by stage: metric and what it is called; held-out figures, and the training ones only where there
# are none
KEY_METRICS = {
    "SFT": (("eval/loss", "held-out loss"), ("sft/loss", "loss")),
    "RM": (("eval/accuracy", "held-out accuracy"), ("rm/accuracy", "accuracy")),
    "DPO": (("eval/accuracy", "held-out accuracy"), ("dpo/accuracy", "accuracy")),
    "PPO": (
        ("eval/score", "held-out score"),
        ("eval/gold", "held-out gold"),
        ("reward/score_mean", "score"),
    ),
}


@dataclass(frozen=True)
class Shown:
    """One run's part of the page."""

    name: str
    alerts: list[dict[str, Any]]
    metrics: list[tuple[str, str, str, int]]  # name, first, last, step of the last
    samples: list[dict[str, Any]]
    recipe: str
    environment: str


def write_report(
    run_dirs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "",
    table: Sequence[Mapping[str, object]] = (),
    figures_to: str | Path | None = None,
) -> Path:
    """Writes the page to `out`, and the figures as PNG, SVG and PDF to the folder `figures_to`.

    `table`: rows of the caller's own summary (column -> value); without it one is made from the
    runs.

    Raises UserError as load_run does; nothing is written then.
    """
    runs = [load_run(d) for d in run_dirs]
    rows = [{str(k): printable(str(v)) for k, v in row.items()} for row in table] or [
        summary(run) for run in runs
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    figures = draw(runs)
    images = []
    for name, figure in figures.drawn.items():
        png = rendered(figure, "png")
        if figures_to is not None:
            save({name: figure}, figures_to)
        width = round(figure.get_figwidth() * 105)
        images.append(
            (name.replace("_", " "), base64.b64encode(png).decode(), CAPTIONS[name], width)
        )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(PAGE).render(
        title=printable(title or " · ".join(run.name for run in runs)),
        columns=columns,
        rows=rows,
        images=images,
        missing=sorted((name.replace("_", " "), why) for name, why in figures.missing.items()),
        runs=[show(run) for run in runs],
        sample_columns=SAMPLE_COLUMNS,
    )
    write_text(out, page)
    return Path(out)


def summary(run: Run) -> dict[str, str]:
    """Stage, steps, time and key figure of a run."""
    wanted = KEY_METRICS.get(run.stage, KEY_METRICS["PPO"])
    held_out = [
        (metric, label)
        for metric, label in wanted
        if metric.startswith("eval/") and run.last(metric) is not None
    ]
    figures = []
    for metric, label in held_out or wanted:
        steps, values = run.series(metric)
        if values:
            start = f"{number(values[0])} → " if len(values) > 1 else ""
            figures.append(
                f"{label} {start}{number(values[-1])}{_interval(run, metric, values[-1])} (step"
                f" {steps[-1]})"
            )
    return {
        "run": printable(run.name),
        "stage": run.stage,
        "steps": str(run.num_steps),
        "time": duration(run.seconds),
        "key figure": "; ".join(figures) or "–",
        "alerts": str(len(run.alerts)),
    }


def _interval(run: Run, metric: str, share: float) -> str:
    """The 95 % interval of a held-out accuracy, where the number of pairs is known."""
    pairs = run.last("eval/pairs") if metric == "eval/accuracy" else None
    if not pairs:
        return ""
    low, high = wilson_interval(share, round(pairs))
    return f" [{number(low)}, {number(high)}]"


def show(run: Run) -> Shown:
    metrics = []
    for name in sorted(run.names):
        steps, values = run.series(name)
        metrics.append(
            (name, number(values[0]), number(values[-1]), steps[-1])
            if values
            else (name, "–", "–", 0)
        )
    sampled = sorted({row["step"] for row in run.samples})
    shown = []
    for step in dict.fromkeys((sampled[:1] + sampled[-1:]) if sampled else []):
        rows = [row for row in run.samples if row["step"] == step]
        # spread out: neighbours answer the same prompt
        shown += rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]
    return Shown(
        name=printable(run.name),
        alerts=[
            {"step": row["step"], "message": printable(str(row["message"]))} for row in run.alerts
        ],
        metrics=metrics,
        samples=[_sample(row) for row in shown],
        recipe=printable(run.recipe_text),
        environment=printable(run.environment_text),
    )


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {
        c: number(row[c]) if isinstance(row[c], (int, float)) else printable(str(row[c]))
        for c in SAMPLE_COLUMNS
        if c in row
    }
    texts = {c: printable(str(row[c])) if c in row else "" for c in ("prompt", "response")}
    return {"step": row["step"], "cells": cells, **texts}
