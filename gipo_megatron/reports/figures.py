"""The figures of one or several runs, from their folders. A figure without data is not drawn but
named with its reason."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gipo_megatron.files import write_bytes
from gipo_megatron.reports import curves, distributions
from gipo_megatron.reports.runs import Group, Run, group_by_seed, load_run
from gipo_megatron.reports.style import Drawn, style

FORMATS = ("png", "svg", "pdf")
FIGURES: dict[str, Callable[[list[Group]], Drawn]] = {
    "reward": curves.reward,
    "reward_distribution": distributions.reward_distribution,
    "kl": curves.kl,
    "frontier": curves.frontier,
    "group_returns": curves.group_returns,
    "sources": curves.sources,
    "gold_by_source": curves.gold_by_source,
    "weights": curves.weights,
    "p_high": distributions.p_high,
    "explained_variance": curves.explained_variance,
    "loss": curves.loss,
    "accuracy": curves.accuracy,
    "rollout": curves.rollout,
}


@dataclass(frozen=True)
class Figures:
    drawn: dict[str, Figure]
    missing: dict[str, str]  # name -> what the runs lack


def draw(
    runs: Sequence[Run], figures: Mapping[str, Callable[[list[Group]], Drawn]] = FIGURES
) -> Figures:
    """All of `figures`; runs that differ only in their seed are one line with a band."""
    groups = group_by_seed(runs)
    drawn: dict[str, Figure] = {}
    missing: dict[str, str] = {}
    for name, make in figures.items():
        with style():
            figure = make(groups)
        if isinstance(figure, Figure):
            drawn[name] = figure
        else:
            missing[name] = figure
    return Figures(drawn, missing)


def write_figures(
    run_dirs: Sequence[str | Path], out: str | Path, formats: Sequence[str] = FORMATS
) -> tuple[list[Path], dict[str, str]]:
    """Draws into `out`; returns the files written and {figure: why it was not drawn}. Raises
    UserError as load_run does."""
    figures = draw([load_run(d) for d in run_dirs])
    return save(figures.drawn, out, formats), figures.missing


def save(
    figures: Mapping[str, Figure], out: str | Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """One file per figure and format, `out`/<name>.<format>."""
    written = []
    for name, figure in figures.items():
        for kind in formats:
            path = Path(out) / f"{name}.{kind}"
            write_bytes(path, rendered(figure, kind))
            written.append(path)
    return written


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure's file as png, svg or pdf; the same bytes for the same figure."""
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[
        kind
    ]
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=kind, dpi=160, facecolor="white", metadata=metadata)
    return buffer.getvalue()
