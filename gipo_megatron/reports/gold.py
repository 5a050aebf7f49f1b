"""Gold reward of held-out prompts: last evaluation, highest, difference, and standard errors. A
final far below the peak is over-optimisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gipo_megatron.reports.curves import names
from gipo_megatron.reports.pages import number
from gipo_megatron.reports.runs import RunFolder, SeedGroup, finite

WORSE, MEAN = "worse group", "all prompts"  # columns beside the sources; worse: the lowest


def sources_of(groups: Sequence[SeedGroup]) -> list[str]:
    """Return the sources whose held-out gold some run has."""
    return names(list(groups), "eval/gold/", "")


def of_the_data(run: RunFolder) -> bool:
    """Check that gold is not a model's score: those of different sources have no common zero, so
    none is the worse group and there is no gap."""
    models = (run.recipe or {}).get("models") or {}
    return not (models.get("gold") or {}).get("load")


def curve(run: RunFolder, column: str, sources: Sequence[str]) -> dict[int, float]:
    """Return step -> gold of a source, of all prompts, or of the lowest source."""
    if column != WORSE:
        metric = "eval/gold" if column == MEAN else f"eval/gold/{column}"
        return dict(zip(*run.series(metric), strict=True))
    curves = [curve(run, source, sources) for source in sources]
    steps = sorted(set().union(*curves))
    return {step: min(one[step] for one in curves if step in one) for step in steps}


def worst_source(run: RunFolder, sources: Sequence[str]) -> str:
    """Return the source with the lowest gold at the last evaluation."""
    ends = {source: run.last(f"eval/gold/{source}") for source in sources}
    return min((end, source) for source, end in ends.items() if end is not None)[1]


def by_prompt(run: RunFolder, column: str) -> dict[str, float]:
    """Return prompt -> gold at the last evaluation, of a source or of all prompts."""
    last = run.series("eval/gold")[0][-1:]
    return {
        row["prompt"]: row["gold"]
        for row in run.held_out
        if row["step"] in last and column in (MEAN, row["source"]) and finite(row.get("gold"))
    }


def error_over_prompts(run: RunFolder, column: str, gold: Sequence[float]) -> float | None:
    """Return s / √n of gold or of differences of gold; None for fewer than two.

    s is theirs. n is the number of held-out prompts behind the column: of several replicas
    held_out.jsonl has the first's prompts alone.
    """
    counted = [name for name in run.names if name.startswith("eval/prompts/")]
    if column != MEAN:
        counted = [f"eval/prompts/{column}"]
    count = sum(run.last(name) or 0 for name in counted)
    return float(np.std(gold, ddof=1) / count**0.5) if len(gold) > 1 and count else None


def error(group: SeedGroup, column: str, sources: Sequence[str]) -> float | None:
    """Return the standard error of the last gold; None where it is not known."""
    if len(group.runs) > 1:
        ends = [[*curve(run, column, sources).values()][-1] for run in group.runs]
        return float(np.std(ends, ddof=1) / len(ends) ** 0.5)
    (run,) = group.runs
    column = worst_source(run, sources) if column == WORSE else column
    return error_over_prompts(run, column, [*by_prompt(run, column).values()])


def table(groups: Sequence[SeedGroup]) -> list[list[str]]:
    """Return a header and three rows a system: last evaluation, peak, last − peak. Empty without
    gold by source."""
    sources = sources_of(groups)
    common = all(of_the_data(run) for group in groups for run in group.runs)
    columns = [*sources, WORSE, MEAN] if common else [*sources, MEAN]
    rows = [["system", "held-out gold", *columns, "gap", "KL"]]
    for group in groups:
        if all(curve(run, x, sources) for run in group.runs for x in (WORSE, MEAN)):
            rows += _rows(group, columns, sources)
    return rows if len(rows) > 1 else []


def _rows(group: SeedGroup, columns: Sequence[str], sources: Sequence[str]) -> list[list[str]]:
    finals: list[str] = []
    peaks: list[str] = []
    falls: list[str] = []
    ends: list[float] = []
    for column in columns:
        curves = [curve(run, column, sources) for run in group.runs]
        shared = sorted(set.intersection(*map(set, curves)))
        means = [float(np.mean([one[step] for one in curves])) for step in shared]
        if not means:  # a source that this system's data lack
            finals, peaks, falls = [[*cells, "–"] for cells in (finals, peaks, falls)]
            continue
        final, peak = means[-1], max(means)
        finals.append(with_error(final, error(group, column, sources)))
        peaks.append(f"{peak:.3f}")
        falls.append(f"{final - peak:+.3f}")
        ends += [final] if column in sources else []
    gap = f"{max(ends) - min(ends):.3f}" if ends and WORSE in columns else "–"
    kl = group.band("eval/kl")[1]
    return [
        [group.label, f"final, step {shared[-1]}", *finals, gap, f"{kl[-1]:.2f}" if kl else "–"],
        ["", "peak", *peaks, "", ""],
        ["", "final − peak", *falls, "", ""],
    ]


def with_error(value: float, noise: float | None, sign: str = "") -> str:
    """Write 0.467 ± 0.064; without ± where the noise is not known, or 0: all prompts alike."""
    shown = f"{value:{sign}.3f}"
    return f"{shown} ± {noise:.3f}" if noise else shown


def gold_course(run: RunFolder) -> str:
    """Return `peak … at step …, final …, lost …` of eval/gold; "" for a run without it.

    Lost is peak - final: 0 where the last evaluation is the best one.
    """
    steps, values = run.series("eval/gold")
    if not values:
        return ""
    peak, final = max(values), values[-1]
    step = steps[values.index(peak)]
    return f"peak {number(peak)} at step {step}, final {number(final)}, lost {number(peak - final)}"
