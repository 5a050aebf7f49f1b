"""S2's figure: worse-group gold against KL, and gold and proxy against iterations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from tools.studies.cells import Cell
from tools.studies.compare import BASELINE, WorldCells
from tools.studies.inference import interval
from tools.studies.systems import SYSTEMS

COLOURS = {BASELINE: "black", "gipo_head": "C0", "gipo_value": "C1", "gipo_both": "C2"}
COLOURS |= {"adaptive": "C3", "oracle": "C7"}
AGAINST_STEPS = (BASELINE, "gipo_both")
ETA = 0.3  # of the panels against iterations
COLUMNS = 4


def draw(path: Path, worlds: Sequence[WorldCells], cells: Sequence[Cell]) -> None:
    """One column per world; more than four worlds continue below."""
    plt.rcParams.update({"svg.hashsalt": "s2", "svg.fonttype": "none", "font.size": 8})
    columns = min(COLUMNS, len(worlds))
    blocks = -(-len(worlds) // columns)
    figure, axes = plt.subplots(
        2 * blocks, columns, figsize=(2.8 * columns, 4.8 * blocks), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for panel in axes.flat:
        panel.set_visible(False)
    for i, world in enumerate(worlds):
        above, below = axes[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        above.set_title(world.name)
        against_kl(above, world)
        against_steps(below, [c for c in cells if c.world == world.name and c.eta == ETA])
    handles = axes[0, 0].get_legend_handles_labels(), axes[1, 0].get_legend_handles_labels()
    lines, labels = ([*handles[0][k], *handles[1][k]] for k in (0, 1))
    figure.legend(
        lines, labels, loc="outside lower center", ncols=max(1, columns - 1), frameon=False
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def against_kl(axes: Any, world: WorldCells) -> None:
    axes.set_visible(True)
    for system, colour in COLOURS.items():
        of_eta = world.points if system == BASELINE else world.of.get(system, {})
        points = [of_eta[eta] for eta in sorted(of_eta)]
        if points:
            label = SYSTEMS[system].label + (", every η" if system == BASELINE else "")
            x = [p["kl"].mean() for p in points]
            band(axes, x, [p["worse"] for p in points], colour, "-", label, marker="o")
    axes.set_xlabel("KL to the reference, nats")
    axes.set_ylabel("gold of the worse half")


def against_steps(axes: Any, cells: Sequence[Cell]) -> None:
    axes.set_visible(True)
    for system in AGAINST_STEPS:
        for cell in (c for c in cells if c.system == system):
            steps = [row[0] for row in cell.trace["step"]]
            for kind, style in (("gold", "-"), ("proxy", ":")):
                halves = (np.array(cell.trace[f"{kind}_{half}"]) for half in ("easy", "hard"))
                rows = list(sum(halves) / 2)
                label = f"{kind}, {SYSTEMS[system].label}, η {ETA:g}"
                band(axes, steps, rows, COLOURS[system], style, label)
    axes.set_xlabel("iteration")
    axes.set_ylabel("mean of both halves")


def band(
    axes: Any, x: Sequence[float], rows: Sequence[np.ndarray], colour: str, style: str,
    label: str, marker: str = "",
) -> None:  # fmt: skip
    """Draw the mean over seeds and its 95 % interval."""
    low, high = zip(*(interval(row) for row in rows), strict=True)
    axes.plot(
        x, [row.mean() for row in rows], style, color=colour, marker=marker, markersize=2.5,
        linewidth=1, label=label,
    )  # fmt: skip
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
