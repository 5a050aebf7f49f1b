"""S4's figure: gold against KL."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from tools.studies.s4_cells import BASELINE, MIDDLE
from tools.studies.s4_compare import DIFFICULTY, SOURCES, Measure, Study
from tools.studies.systems import SYSTEMS


def draw(path: Path, study: Study) -> None:
    """One panel for the mean, and one for the worse group of each kind."""
    plt.rcParams.update({"svg.hashsalt": "s4", "svg.fonttype": "none", "font.size": 8})
    panels: dict[str, Measure] = {
        "mean gold": study.mean,
        "gold of the worse source": partial(study.worse, kind=SOURCES),
        "gold of the worse half by difficulty": partial(study.worse, kind=DIFFICULTY),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.2), layout="constrained")
    for axis, (name, measure) in zip(axes, panels.items(), strict=True):
        panel(axis, study, measure)
        axis.set_xlabel("KL to the start, nats a response")
        axis.set_ylabel(name)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def panel(axis: plt.Axes, study: Study, measure: Measure) -> None:
    """The curve of PPO with KL of each seed, and a point with its interval over prompts for each
    other cell."""
    for seed in study.seeds:
        curve = study.curve(seed)
        label = f"{SYSTEMS[BASELINE].label}, from the start on" if seed == study.seeds[0] else None
        kl = [float(study.kl(cell)[0]) for cell in curve]
        gold = [float(measure(cell)[0]) for cell in curve]
        axis.plot(kl, gold, "o-", color="black", markersize=2.5, linewidth=1, label=label)
    systems = [s for s in SYSTEMS if s != BASELINE and any(key[1] == s for key in study.of)]
    for number, system in enumerate(systems):
        cells = [
            study.of[s, system, MIDDLE] for s in study.seeds if (s, system, MIDDLE) in study.of
        ]
        for cell in cells:
            found = measure(cell)
            x, y = study.kl(cell)[0], found[0]
            low, high = np.percentile(found[1:], [2.5, 97.5])
            bars = [[max(y - low, 0)], [max(high - y, 0)]]
            axis.errorbar(
                x, y, bars, fmt="o", markersize=3, linewidth=1, color=f"C{number}",
                label=SYSTEMS[system].label if cell is cells[0] else None,
            )  # fmt: skip
