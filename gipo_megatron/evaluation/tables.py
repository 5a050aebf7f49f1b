"""The results as a table: a row per baseline, win / tie / lose % per task; Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas

from gipo_megatron.evaluation.statistics import OUTCOMES
from gipo_megatron.screen import markdown, one_line

LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&",
    "#": r"\#", "%": r"\%", "_": r"\_",
    "[": "{[}", "]": "{]}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def percent(count: int, n: int) -> str:
    """Return 58.9, or a dash without a judged prompt."""
    return f"{100 * count / n:.1f}" if n else "–"


def interval(bounds: list[float] | None) -> str:
    """Return [55.1, 62.4] in percent; empty without an interval."""
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else ""


def judge_name(results: Mapping[str, Any]) -> str:
    """Return the judge's name in tables: its model, if it has one."""
    about = results["judge"]
    return str(about.get("model") or about.get("name", "judge"))


def markdown_table(results: Mapping[str, Any]) -> str:
    """Return one row per baseline: % of the judged prompts with 95 % intervals, then counts."""
    tasks = results["tasks"]
    shares = [f"{markdown(task)}: {outcome} %" for task in tasks for outcome in OUTCOMES]
    rows = []
    for baseline, cells, failed, flipped, n in _rows(results):
        values = [
            f"{percent(c[o], c['n'])} {interval(c['ci95'][o])}".strip() if c else "–"
            for c, o in cells
        ]
        names = (markdown(judge_name(results)), markdown(baseline))
        rows.append([*names, *values, f"{failed} of {failed + n}", f"{flipped} of {n}"])
    frame = pandas.DataFrame(rows, columns=["judge", "baseline", *shares, "failed", "flipped"])
    align = ["left", "left", *["right"] * (len(shares) + 2)]
    table = frame.to_markdown(index=False, disable_numparse=True, colalign=align if rows else None)
    title = (
        f"**{markdown(results['subject'])}** against each baseline, in % of the judged prompts,"
        " with bootstrap 95 % intervals."
    )
    notes = "".join(f"Incomplete: {markdown(cell)}.\n\n" for cell in results["incomplete"])
    notes += "".join(f"Warning: {markdown(text)}.\n\n" for text in results["warnings"])
    return f"{title}\n\n{notes}{table}\n"


def latex_table(results: Mapping[str, Any]) -> str:
    """Return a table for \\usepackage{booktabs}: % in one line, intervals below in small print."""
    tasks = results["tasks"]
    rows = []
    for baseline, cells, failed, flipped, _ in _rows(results):
        shares = [percent(c[o], c["n"]).replace("–", "--") if c else "--" for c, o in cells]
        small = [rf"{{\tiny {interval(c['ci95'][o])}}}" if c and c["n"] else "" for c, o in cells]
        names = (latex(judge_name(results)), latex(baseline))
        rows += [[*names, *shares, failed, flipped], ["", "", *small, "", ""]]
    outcomes = [(latex(task), outcome.title()) for task in tasks for outcome in OUTCOMES]
    columns = [("Judge", ""), ("Baseline", ""), *outcomes, ("Failed", ""), ("Flipped", "")]
    frame = pandas.DataFrame(rows, columns=pandas.MultiIndex.from_tuples(columns))
    lines = frame.to_latex(
        index=False,
        escape=False,
        column_format="ll" + "r" * (len(columns) - 2),
        multicolumn_format="c",
    ).splitlines()
    rules = [rf"\cmidrule(lr){{{3 * i + 3}-{3 * i + 5}}}" for i in range(len(tasks))]
    title = (
        f"% {one_line(results['subject'])} against each baseline, % of the judged prompts,"
        " bootstrap 95 % intervals"
    )
    # pandas groups the columns of a task, but draws no rule below the task's name
    return "\n".join([title, *lines[:3], " ".join(rules), *lines[3:]]) + "\n"


def _rows(results: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[Any, str]], int, int, int]]:
    """Yield baseline, (cell or None, outcome) per task and outcome; failed, flipped, n in total."""
    tasks = results["tasks"].values()
    for baseline in dict.fromkeys(name for cells in tasks for name in cells):
        found = [cells[baseline] for cells in tasks if baseline in cells]
        failed, flipped, n = (sum(c[k] for c in found) for k in ("failed", "flipped", "n"))
        yield baseline, [(c.get(baseline), o) for c in tasks for o in OUTCOMES], failed, flipped, n


def latex(text: str) -> str:
    """Escape LaTeX's special characters."""
    return "".join(LATEX.get(character, character) for character in one_line(text))
