"""S3's figure: gold of each source against iterations, and the worse source's differences at equal
KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from tools.studies.compare import BASELINE, WorldCells
from tools.studies.curves import Cell
from tools.studies.figure import band


def draw(
    path: Path, world: WorldCells, cells: Sequence[Cell], labels: Mapping[str, str], system: str
) -> None:
    """Draw `system` at the middle one of its η, and PPO with KL at the η that gives the nearest
    KL. `cells` are of the seeds of `world`."""
    plt.rcParams.update({"svg.hashsalt": "s3", "svg.fonttype": "none", "font.size": 9})
    figure, (easy, hard, right) = plt.subplots(1, 3, figsize=(8.4, 3.1), layout="constrained")
    hard.sharey(easy)
    etas = sorted(world.of[system])
    eta = etas[len(etas) // 2]
    kl = world.of[system][eta]["kl"]
    for panel, source in ((easy, "easy"), (hard, "hard")):
        for name, at, colour in ((BASELINE, nearest(world, kl), "black"), (system, eta, "C1")):
            label = f"{labels[name]}, η {at:g}: KL {world.of[name][at]['kl'].mean():.2f}"
            curves = [c.curve for c in cells if (c.system, c.eta) == (name, at)]
            steps = np.array(curves[0]["step"], dtype=float).tolist()
            rows = list(np.array([curve[source] for curve in curves], dtype=float).T)
            band(panel, steps, rows, colour, "-", label)
        panel.set_title(f"{source} prompts", fontsize=9)
        panel.set_xlabel("iteration")
    easy.set_ylabel("gold")
    differences(right, world, labels)
    for panel in (easy, hard, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Planted language world: gold of held-out prompts, mean of {len(kl)} seeds and 95 %"
        " bootstrap interval",
        fontsize=10,
    )
    lines, names = easy.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower left", ncols=2, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def nearest(world: WorldCells, kl: np.ndarray) -> float:
    """Return the η of PPO with KL whose KL, the mean over seeds, is nearest to that of `kl`."""
    points = world.points
    return min(points, key=lambda eta: abs(float(points[eta]["kl"].mean() - kl.mean())))


def differences(axes: Any, world: WorldCells, labels: Mapping[str, str]) -> None:
    """Draw the worse source's difference of each system to PPO with KL at equal KL."""
    found = {
        label: world.difference(system, "worse", "kl")
        for system, label in labels.items()
        if system != BASELINE and system in world.of
    }
    for row, difference in enumerate(found.values()):
        if difference is not None:
            mean = difference.values.mean()
            low, high = difference.interval
            axes.errorbar(
                mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color="C1",
                markersize=4, capsize=3,
            )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_title("worse source at equal KL", fontsize=9)
    axes.set_xlabel("gold − that of PPO with KL")
