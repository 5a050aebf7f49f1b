"""Study S2: train the planted bandit's cells, then write the tables and the figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gipo_megatron.errors import UserError
from gipo_megatron.files import write_text
from tools.studies import figure, tables
from tools.studies.cells import ETAS, WORLDS, Cell, etas_of, load, run_all
from tools.studies.compare import BASELINE, Finding, Rule, WorldCells, findings
from tools.studies.inference import sign_flip
from tools.studies.options import Options
from tools.studies.systems import SYSTEMS

# system and at what it is compared, in each world: written before the run (docs/studies/s2.md)
REGISTERED = (
    ("gipo_head", "kl"),
    ("gipo_value", "kl"),
    ("gipo_both", "kl"),
    ("adaptive", "price"),
)
RULE = Rule(
    [(spec.name, *comparison) for spec in WORLDS for comparison in REGISTERED],
    lambda worse, mean: sign_flip(worse),
)
LABELS = {name: system.label for name, system in SYSTEMS.items()}


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


def main(options: Options) -> None:
    """Write s2_tables.md, s2.svg and s2.csv to `docs`; raises UserError without a whole curve."""
    seeds, steps, docs = options.seeds, options.steps, options.docs
    file = options.out / "cells.jsonl"
    cells = run_all(file, seeds, steps) if options.train else load(file, seeds, steps)
    worlds = by_world(cells)
    if not worlds:
        raise UserError(
            f"no world is complete with seeds={seeds} steps={steps}", where=str(file),
            fix="start without train=false",
        )  # fmt: skip
    every = len(WORLDS) * sum(len(etas_of(name)) for name in SYSTEMS)
    setting = (
        f"{seeds} seeds × {steps} iterations; {len(cells)} of {every} cells (world × system × η)"
        " have been trained."
    )
    command = f"python tools/study.py s2 seeds={seeds} steps={steps}"
    found = findings(worlds, RULE)
    write_text(docs / "s2_tables.md", page(worlds, found, command, setting))
    write_text(docs / "s2.csv", csv(worlds))
    figure.draw(docs / "s2.svg", worlds, cells)
    for f in found:
        print(f"{f.world}: {LABELS[f.system]}: {f.verdict}")


def by_world(cells: Sequence[Cell]) -> list[WorldCells]:
    """Return the worlds whose curve is complete."""
    worlds = {spec.name: WorldCells(spec.name, {}, ETAS) for spec in WORLDS}
    for cell in cells:
        worlds[cell.world].of.setdefault(cell.system, {})[cell.eta] = last(cell)
    whole = {"ppo": etas_of("ppo"), BASELINE: etas_of(BASELINE)}
    return [
        world
        for world in worlds.values()
        if all(set(etas) <= set(world.of.get(system, {})) for system, etas in whole.items())
    ]


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
        tables.registered(findings, LABELS),
    ]
    for at in ("kl", "price"):
        parts += [
            f"## All systems at {tables.AT[at]}",
            tables.OWN_POINT,
            tables.compared(worlds, LABELS, at),
        ]
    parts += [
        "## Each system at its best η",
        "η is chosen by mean gold on the other half of the seeds; so no number was used to choose"
        " itself. Mean over seeds.",
        tables.best(worlds, LABELS),
    ]
    return "\n\n".join(parts) + "\n"


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
