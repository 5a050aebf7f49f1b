"""Study S2: run the planted bandit's cells, then write the table and the figure."""

from __future__ import annotations

from pathlib import Path

from tools.studies.cells import run_all


def main(seeds: int, steps: int, out: Path, docs: Path) -> None:
    cells = run_all(out / "cells.jsonl", seeds, steps)
    print(f"{len(cells)} cells")
