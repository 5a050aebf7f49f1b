"""Draw the README's figure, docs/gap.svg, from the table in docs/results.md.

python docs/gap_figure.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent
SYSTEMS = {"PPO with KL": "PPO with KL", "GIPO": "GIPO", "given groups": "GIPO, groups given"}


def table() -> dict[str, tuple[float, float]]:
    """System -> (gap, standard error), from the section "Planted bandit (difficulty)"."""
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    section = text.partition("## Planted bandit (difficulty)")[2].partition("\n## ")[0]
    found = {}
    for start, label in SYSTEMS.items():
        row = re.search(rf"^\| {start}[^|]*\| ([\d.]+) ± ([\d.]+) \|", section, re.MULTILINE)
        assert row is not None, f"results.md has no row {start!r}"
        found[label] = (float(row[1]), float(row[2]))
    return found


def draw(values: dict[str, tuple[float, float]]) -> None:
    plt.rcParams.update({"svg.hashsalt": "gap", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(figsize=(5.6, 1.7), layout="constrained")
    for row, (gap, error) in enumerate(values.values()):
        axes.errorbar(gap, row, xerr=error, fmt="o", capsize=4, color=f"C{row}")
        axes.annotate(f"{gap:.3f}", (gap, row), (0, 6), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.7)
    axes.set_xlim(0, 0.2)
    axes.set_xlabel("true reward, easy − hard prompts (5 seeds ± standard error)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(DOCS / "gap.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(table())
