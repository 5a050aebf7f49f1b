"""S3's figure: gold of each source against iterations, and of the worse source against KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from tools.studies.compare import BASELINE, WorldCells
from tools.studies.curves import Cell
from tools.studies.figure import band
from tools.studies.inference import interval

COLOURS = {BASELINE: "black", "gipo_head": "C0", "gipo_value": "C1", "adaptive": "C3"}
COLOURS |= {"oracle": "C2", "random": "C7"}


def draw(
    path: Path, world: WorldCells, cells: Sequence[Cell], labels: Mapping[str, str], system: str
) -> None:
    """Draw `system` at the middle one of its η, and PPO with KL at the η that gives the nearest
    KL. `cells` are of the seeds of `world`."""
    plt.rcParams.update({"svg.hashsalt": "s3", "svg.fonttype": "none", "font.size": 8})
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.2), layout="constrained")
    etas = sorted(world.of[system])
    eta = etas[len(etas) // 2]
    for name, of_eta in ((BASELINE, nearest(world, world.of[system][eta]["kl"])), (system, eta)):
        kl = world.of[name][of_eta]["kl"].mean()
        label = f"{labels[name]}, η {of_eta:g}: KL {kl:.2f}"
        curves = [c.curve for c in cells if (c.system, c.eta) == (name, of_eta)]
        for panel, source in zip(axes, ("easy", "hard"), strict=False):
            against_steps(panel, curves, source, COLOURS[name], label)
    for panel, source in zip(axes, ("easy", "hard"), strict=False):
        panel.set_title(f"{source} prompts")
        panel.set_xlabel("iteration")
    axes[0].set_ylabel("gold")
    against_kl(axes[2], world, labels)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    seeds = len(world.of[system][eta]["kl"])
    figure.suptitle(
        f"Gold of held-out prompts: mean of {seeds} seeds, and its 95 % bootstrap interval"
    )
    handles, names = axes[0].get_legend_handles_labels()
    more, more_names = axes[2].get_legend_handles_labels()
    figure.legend(
        [*handles, *more], [*names, *more_names], loc="outside lower center", ncols=2,
        frameon=False,
    )  # fmt: skip
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def nearest(world: WorldCells, kl: np.ndarray) -> float:
    """Return the η of PPO with KL whose KL, the mean over seeds, is nearest to that of `kl`."""
    points = world.points
    return min(points, key=lambda eta: abs(float(points[eta]["kl"].mean() - kl.mean())))


def against_steps(axes: Any, curves: Sequence[Any], source: str, colour: str, label: str) -> None:
    rows = list(np.array([curve[source] for curve in curves]).T)
    band(axes, curves[0]["step"], rows, colour, "-", label)


def against_kl(axes: Any, world: WorldCells, labels: Mapping[str, str]) -> None:
    """Draw the curve of PPO with KL, and each other system's points with their intervals."""
    curve = sorted(world.points.values(), key=lambda point: float(point["kl"].mean()))
    band(
        axes, [p["kl"].mean() for p in curve], [p["worse"] for p in curve], COLOURS[BASELINE],
        "-", f"{labels[BASELINE]}, every η", marker="o",
    )  # fmt: skip
    for system, colour in COLOURS.items():
        if system != BASELINE and system in world.of:
            points = list(world.of[system].values())
            x, y = (np.array([p[name].mean() for p in points]) for name in ("kl", "worse"))
            ends = np.array([interval(p["worse"]) for p in points]).T
            axes.errorbar(
                x, y, yerr=np.abs(ends - y), fmt="s", color=colour, markersize=4, capsize=2,
                linewidth=1, label=labels[system],
            )  # fmt: skip
    axes.set_title("worse source, end of training")
    axes.set_xlabel("KL to the reference, nats per response")
