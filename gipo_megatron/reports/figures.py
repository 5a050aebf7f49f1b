"""The figures of one or several runs, from their folders. A figure without data is not drawn; it is
listed with the reason."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gipo_megatron.files import write_bytes
from gipo_megatron.reports import curves, distributions
from gipo_megatron.reports.runs import RunFolder, group_by_seed, load_run
from gipo_megatron.reports.style import style

FORMATS = ("png", "svg", "pdf")
FIGURES: dict[str, curves.Draw] = {
    "gold_by_source": curves.gold_by_source,
    "reward": curves.lines(
        {
            "reward/score_mean": "score, training prompts",
            "eval/score": "score, held-out prompts",
            "eval/gold": "gold reward, held-out prompts",
        },
        columns=3,
    ),
    "reward_distribution": distributions.reward_distribution,
    "kl": curves.lines(
        {
            "kl/mean": "KL to the reference (nats per response)",
            "kl/coef_mean": "mean KL coefficient",
        }
    ),
    "frontier": curves.frontier,
    "group_returns": curves.group_returns,
    "sources": curves.sources,
    "weights": curves.weights,
    "p_high": distributions.p_high,
    "explained_variance": curves.explained_variance,
    "loss": curves.losses,
    "accuracy": curves.accuracies,
    "rollout": curves.lines(
        {
            "rollout/length_mean": "response length (tokens)",
            "rollout/truncated": "share of truncated responses",
        }
    ),
}


@dataclass(frozen=True)
class Figures:
    drawn: dict[str, Figure]
    missing: dict[str, str]  # name -> reason


def draw(runs: Sequence[RunFolder]) -> Figures:
    """Draw all figures. Runs that differ only in their seed are one line with a band."""
    groups = group_by_seed(runs)
    with style():
        made = {name: make(groups) for name, make in FIGURES.items()}
    return Figures(
        {name: figure for name, figure in made.items() if isinstance(figure, Figure)},
        {name: figure for name, figure in made.items() if isinstance(figure, str)},
    )


def write_figures(
    run_dirs: Sequence[str | Path], out: str | Path, formats: Sequence[str] = FORMATS
) -> tuple[list[Path], dict[str, str]]:
    """Draw into `out`. Return the files written and {figure: why it was not drawn}. Raises
    UserError as load_run does."""
    figures = draw([load_run(folder) for folder in run_dirs])
    return save(figures.drawn, out, formats), figures.missing


def save(
    figures: Mapping[str, Figure], out: str | Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write one file per figure and format, `out`/<name>.<format>."""
    written = []
    for name, figure in figures.items():
        for kind in formats:
            path = Path(out) / f"{name}.{kind}"
            write_bytes(path, rendered(figure, kind))
            written.append(path)
    return written


def rendered(figure: Figure, kind: str) -> bytes:
    """Return the figure as png, svg or pdf; the same bytes for the same figure."""
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=kind, dpi=160, facecolor="white", metadata=metadata[kind])
    return buffer.getvalue()
