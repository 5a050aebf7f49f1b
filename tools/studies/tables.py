"""Markdown tables of comparisons. `labels`: what each system is called, in the order of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tools.studies.compare import BASELINE, Finding, WorldCells
from tools.studies.inference import interval

OUTSIDE = "outside of the curve"
OWN_POINT = (
    "The rows of PPO with KL compare it with its own curve, each point left out in turn: the error"
    " of straight lines over twice the distance between points, so an upper bound of the error that"
    " they have in the other rows."
)
AT = {"kl": "equal KL", "price": "equal price"}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def registered(findings: Sequence[Finding], labels: Mapping[str, str]) -> str:
    rows = [
        [
            f.world,
            labels[f.system],
            AT[f.at],
            ", ".join(f"{eta:g}" for eta in f.worse.etas) if f.worse else "",
            f.worse.text() if f.worse else "",
            f"{f.p:.3f}" if f.p is not None else "",
            f.mean.text() if f.mean else "",
            f"**{f.verdict}**" if f.verdict == "shown" else f.verdict,
        ]
        for f in findings
    ]
    head = ["world", "system", "at", "η on the curve", "worse group", "p (Holm)", "mean", "verdict"]
    return markdown_table(head, rows)


def compared(
    worlds: Sequence[WorldCells],
    labels: Mapping[str, str],
    at: str,
    outcomes: Sequence[str] = ("worse", "mean", "easy", "hard"),
) -> str:
    rows = []
    for world in worlds:
        for system in [x for x in labels if x in world.of and x != "ppo"]:
            found = [world.difference(system, outcome, at) for outcome in outcomes]
            texts = [d.text() if d else OUTSIDE for d in found]
            kept = found[0]
            trained = sum(eta in world.of[system] for eta in world.etas)
            count = f"{len(kept.etas) if kept else 0} of {trained}"
            own = ", own point left out" if system == BASELINE else ""
            rows.append([world.name, labels[system] + own, count, *texts])
    return markdown_table(["world", "system", "η on the curve", *outcomes], rows)


def best(worlds: Sequence[WorldCells], labels: Mapping[str, str]) -> str:
    rows = []
    for world in worlds:
        for system in [x for x in labels if x in world.of]:
            outcome, etas = world.best(system)
            numbers = [f"{outcome[x].mean():.3f}" for x in ("easy", "hard", "gap", "kl")]
            rows.append(
                [
                    world.name,
                    labels[system],
                    " / ".join(f"{eta:g}" for eta in etas),
                    *(with_interval(outcome[x]) for x in ("mean", "worse")),
                    *numbers,
                ]
            )
    head = ["world", "system", "η", "mean", "worse", "easy", "hard", "gap", "KL"]
    return markdown_table(head, rows)


def with_interval(x: np.ndarray) -> str:
    low, high = interval(x)
    return f"{x.mean():.3f} [{low:.3f}, {high:.3f}]"
