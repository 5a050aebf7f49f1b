"""Study S2: train the planted bandit's cells, then write the tables and the figure."""

from __future__ import annotations

from gipo_megatron.errors import UserError
from gipo_megatron.files import write_text
from tools.studies import figure, tables
from tools.studies.cells import WORLDS, etas_of, load, run_all
from tools.studies.compare import by_world, findings
from tools.studies.options import Options
from tools.studies.systems import SYSTEMS


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
    found = findings(worlds)
    write_text(docs / "s2_tables.md", tables.page(worlds, found, command, setting))
    write_text(docs / "s2.csv", tables.csv(worlds))
    figure.draw(docs / "s2.svg", worlds, cells)
    for f in found:
        print(f"{f.world}: {SYSTEMS[f.system].label}: {f.verdict}")
