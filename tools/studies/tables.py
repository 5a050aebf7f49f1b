"""The Markdown page of S2's tables, and its numbers as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tools.studies.cells import ETAS
from tools.studies.compare import BASELINE, Finding, WorldCells
from tools.studies.inference import interval
from tools.studies.systems import SYSTEMS

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


def page(
    worlds: Sequence[WorldCells], findings: Sequence[Finding], command: str, setting: str
) -> str:
    """Return the whole page."""
    parts = [
        "# Study S2: tables",
        f"Written by `{command}`; [the question and the falsifier](s2.md). {setting} Intervals"
        " are 95 % bootstrap intervals over seeds. A difference is system − PPO with KL, paired by"
        " seed, averaged over the η that lie on the curve of every seed.",
        "![Worse-group gold against KL, and gold and proxy against iterations](s2.svg)",
        "## The pre-registered comparisons",
        registered(findings),
    ]
    for at in ("kl", "price"):
        parts += [f"## All systems at {AT[at]}", OWN_POINT, compared(worlds, at)]
    parts += [
        "## Each system at its best η",
        "η is chosen by mean gold on the other half of the seeds; so no number was used to choose"
        " itself. Mean over seeds.",
        best(worlds),
    ]
    return "\n\n".join(parts) + "\n"


def registered(findings: Sequence[Finding]) -> str:
    rows = [
        [
            f.world,
            SYSTEMS[f.system].label,
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


def compared(worlds: Sequence[WorldCells], at: str) -> str:
    outcomes = ("worse", "mean", "easy", "hard")
    rows = []
    for world in worlds:
        for system in [x for x in SYSTEMS if x in world.of and x != "ppo"]:
            found = [world.difference(system, outcome, at) for outcome in outcomes]
            texts = [d.text() if d else OUTSIDE for d in found]
            kept = found[0]
            count = f"{len(kept.etas) if kept else 0} of {len(ETAS)}"
            label = f"{SYSTEMS[system].label}, own point left out" if system == BASELINE else ""
            rows.append([world.name, label or SYSTEMS[system].label, count, *texts])
    return markdown_table(["world", "system", "η on the curve", *outcomes], rows)


def best(worlds: Sequence[WorldCells]) -> str:
    rows = []
    for world in worlds:
        for system in [x for x in SYSTEMS if x in world.of]:
            outcome, etas = world.best(system)
            numbers = [f"{outcome[x].mean():.3f}" for x in ("easy", "hard", "gap", "kl")]
            rows.append(
                [
                    world.name,
                    SYSTEMS[system].label,
                    " / ".join(f"{eta:g}" for eta in etas),
                    *(_with_interval(outcome[x]) for x in ("mean", "worse")),
                    *numbers,
                ]
            )
    head = ["world", "system", "η", "mean", "worse", "easy", "hard", "gap", "KL"]
    return markdown_table(head, rows)


def _with_interval(x: np.ndarray) -> str:
    low, high = interval(x)
    return f"{x.mean():.3f} [{low:.3f}, {high:.3f}]"


def csv(worlds: Sequence[WorldCells]) -> str:
    """Return the mean over seeds of every cell, one a line."""
    names = ("easy", "hard", "mean", "worse", "gap", "kl", "price")
    lines = [",".join(("hacks", "offset", "system", "eta", *names))]
    for world in worlds:
        words = world.name.replace(",", "").split()
        for system in SYSTEMS:
            for eta, cell in sorted(world.of.get(system, {}).items()):
                numbers = [f"{cell[name].mean():.4f}" for name in names]
                lines.append(",".join([words[1], words[3], system, f"{eta:g}", *numbers]))
    return "\n".join(lines) + "\n"
