"""report.html of one or several runs: one file that opens anywhere and loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gipo_megatron.files import write_bytes, write_text
from gipo_megatron.reports import gold
from gipo_megatron.reports.figures import FORMATS, draw, rendered, save
from gipo_megatron.reports.gold import gold_course
from gipo_megatron.reports.pages import number, render
from gipo_megatron.reports.runs import RunFolder, group_by_seed, load_run
from gipo_megatron.reports.style import pixels
from gipo_megatron.screen import printable
from gipo_megatron.statistics import wilson_interval
from gipo_megatron.telemetry.console import duration

SAMPLES = 4  # rows shown of a run's first and of its last sampled step
SAMPLE_COLUMNS = ("source", "score", "p_high", "weight", "kl", "length")

CAPTIONS = {
    "reward": (
        "Reward model's score on training and held-out prompts; gold reward where the data has it."
        " A score that rises while gold falls is reward hacking."
    ),
    "reward_distribution": (
        "Scores of sampled responses in the first and the last fifth of the steps; lines mark the"
        " means. Skew and kurtosis (excess) are 0 for a Gaussian; CVaR₁₀ is the mean of the lowest"
        " tenth."
    ),
    "kl": "KL to the reference policy, and the KL coefficient.",
    "frontier": "Reward against the root of the KL to the reference, over training.",
    "group_returns": (
        "Mean return of the high-scoring (easy) and the low-scoring (hard) group, and the gap. Each"
        " run's groups are those of its own classifier, so returns and gaps of two runs are not"
        " comparable: compare runs by data source. A gap that closes because the high group falls"
        " is levelling down."
    ),
    "sources": "Mean score by data source: the same prompts in every run, so runs compare here.",
    "gold_by_source": (
        "True (gold) reward of held-out prompts over training, by data source and of all of them."
    ),
    "weights": "Weight of a sequence in the policy's update.",
    "p_high": (
        "Probability of the high-scoring group against score and length, which it should not merely"
        " copy; last fifth of the steps."
    ),
    "explained_variance": "Share of the returns' variance that the critic explains.",
    "loss": "Losses.",
    "accuracy": "Share of pairs where the chosen response is preferred.",
    "rollout": "Length of the responses and the share that reached the limit.",
}


@dataclass(frozen=True)
class Claim:
    """Verdict under the gold figure, the sentences behind it, and a table of other runs (a header
    and rows; may be empty) with its caption."""

    verdict: str
    sentences: Sequence[str]
    caption: str = ""
    table: Sequence[Sequence[str]] = ()


def write_report(
    run_dirs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "",
    figures_to: str | Path | None = None,
    claim: Claim | None = None,
) -> Path:
    """Write the page to `out`, and the figures as PNG, SVG and PDF to the folder `figures_to`.

    Where runs have held-out gold by source, the page opens with its figure, its table and the
    claim. Raises UserError as load_run does; then nothing is written.
    """
    runs = [load_run(folder) for folder in run_dirs]
    figures = draw(runs)
    images = {name: rendered(figure, "png") for name, figure in figures.drawn.items()}
    if figures_to is not None:
        save(figures.drawn, figures_to, [kind for kind in FORMATS if kind != "png"])
        for name, image in images.items():
            write_bytes(Path(figures_to) / f"{name}.png", image)
    shown = [
        {
            "name": name.replace("_", " "),
            "png": images[name],
            "caption": CAPTIONS[name],
            "width": pixels(figure),
        }
        for name, figure in figures.drawn.items()
    ]
    rows = summaries(runs)
    page = render(
        "run_report.html.j2",
        title=title or " · ".join(run.name for run in runs),
        header=list(rows[0]),
        rows=[list(row.values()) for row in rows],
        figures=shown,
        gold=gold.table(group_by_seed(runs)),
        claim=claim,
        missing=sorted((name.replace("_", " "), why) for name, why in figures.missing.items()),
        runs=[_shown(run) for run in runs],
        sample_columns=SAMPLE_COLUMNS,
    )
    write_text(out, page)
    return Path(out)


def summaries(runs: Sequence[RunFolder]) -> list[dict[str, str]]:
    """Return each run's summary, with the course of its gold reward where any run has one."""
    courses = [gold_course(run) for run in runs]
    more = [{"held-out gold": course or "–"} if any(courses) else {} for course in courses]
    return [summary(run) | column for run, column in zip(runs, more, strict=True)]


def summary(run: RunFolder) -> dict[str, str]:
    """Return stage, steps, time and key figure: the headline's held-out metrics, or where a run has
    none, its training metrics."""
    there = [(metric, words) for metric, words in run.headline if run.last(metric) is not None]
    held_out = [(metric, words) for metric, words in there if metric.startswith("eval/")]
    figures = []
    for metric, words in held_out or there:
        steps, values = run.series(metric)
        start = f"{number(values[0])} → " if len(values) > 1 else ""
        end = f"{number(values[-1])}{_interval(run, metric, values[-1])}"
        figures.append(f"{words} {start}{end} (step {steps[-1]})")
    return {
        "run": printable(run.name),
        "stage": run.stage,
        "steps": str(run.num_steps),
        "time": duration(run.seconds),
        "key figure": "; ".join(figures) or "–",
        "alerts": str(len(run.alerts)),
    }


def _interval(run: RunFolder, metric: str, share: float) -> str:
    """Return the 95 % interval of a held-out accuracy, where the number of pairs was logged."""
    pairs = run.last("eval/pairs") if metric == "eval/accuracy" else None
    if not pairs:
        return ""
    low, high = wilson_interval(share, round(pairs))
    return f" [{number(low)}, {number(high)}]"


def _shown(run: RunFolder) -> dict[str, Any]:
    metrics = []
    for name in sorted(run.names):
        steps, values = run.series(name)
        ends = (number(values[0]), number(values[-1]), steps[-1]) if values else ("–", "–", "")
        metrics.append((name, *ends))
    sampled = sorted({row["step"] for row in run.samples})
    samples = []
    for step in dict.fromkeys(sampled[:1] + sampled[-1:]):
        rows = [row for row in run.samples if row["step"] == step]
        # evenly spaced: neighbours are responses to the same prompt
        samples += [_sample(row) for row in rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]]
    return {
        "name": run.name,
        "alerts": run.alerts,
        "metrics": metrics,
        "samples": samples,
        "recipe": run.recipe_text,
        "environment": run.environment_text,
    }


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {key: number(x) if isinstance(x, (int, float)) else x for key, x in row.items()}
    return {"prompt": "", "response": "", **cells}
