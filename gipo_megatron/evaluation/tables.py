"""The paper's table 1 from results.json: a row per opponent, win / tie / lose % per task; Markdown
and LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gipo_megatron.evaluation.statistics import OUTCOMES
from gipo_megatron.reports.pages import printable

LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&",
    "#": r"\#", "%": r"\%", "_": r"\_",
    "[": "{[}", "]": "{]}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def percent(count: int, n: int) -> str:
    """58.9; a dash without a judged prompt."""
    return f"{100 * count / n:.1f}" if n else "–"


def interval(bounds: list[float] | None) -> str:
    """[55.1, 62.4] in percent; empty without one."""
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else ""


def judge_name(results: Mapping[str, Any]) -> str:
    """The judge as tables name it: its model where it has one."""
    about = results["judge"]
    return str(about.get("model") or about.get("name", "judge"))


def opponents(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for cells in results["tasks"].values() for name in cells))


def totals(results: Mapping[str, Any], opponent: str) -> tuple[int, int, int]:
    """(failed, flipped, n) of one opponent over all tasks."""
    cells = [task[opponent] for task in results["tasks"].values() if opponent in task]
    return (
        sum(c["failed"] for c in cells),
        sum(c["flipped"] for c in cells),
        sum(c["n"] for c in cells),
    )


def markdown_table(results: Mapping[str, Any]) -> str:
    """One line per opponent; win, tie and lose in % of the judged prompts with 95 % intervals;
    failed and flipped are counts."""
    tasks = results["tasks"]
    head = [
        "judge",
        "opponent",
        *(f"{markdown(task)}: {outcome} %" for task in tasks for outcome in OUTCOMES),
        "failed",
        "flipped",
    ]
    rows = []
    for opponent in opponents(results):
        failed, flipped, n = totals(results, opponent)
        cells = [tasks[task].get(opponent) for task in tasks]
        shares = [
            f"{percent(c[o], c['n'])} {interval(c['ci95'][o])}".strip() if c else "–"
            for c in cells
            for o in OUTCOMES
        ]
        rows.append(
            [
                markdown(judge_name(results)),
                markdown(opponent),
                *shares,
                f"{failed} of {failed + n}",
                f"{flipped} of {n}",
            ]
        )
    align = ["---", "---", *(["---:"] * (len(head) - 2))]
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    title = (
        f"**{markdown(results['subject'])}** against each opponent, in % of the judged prompts,"
        " with bootstrap 95 % intervals."
    )
    return "\n".join([title, "", lines[0], "| " + " | ".join(align) + " |", *lines[1:]]) + "\n"


def latex_table(results: Mapping[str, Any]) -> str:
    """A booktabs table: % in one line, intervals below in small print. Needs
    \\usepackage{booktabs}."""
    tasks = results["tasks"]
    columns = "ll" + "rrr" * len(tasks) + "rr"
    last = [2 + 3 * (i + 1) for i in range(len(tasks))]
    head = [
        "Judge",
        "Opponent",
        *(rf"\multicolumn{{3}}{{c}}{{{latex(task)}}}" for task in tasks),
        "Failed",
        "Flipped",
    ]
    rules = " ".join(rf"\cmidrule(lr){{{end - 2}-{end}}}" for end in last)
    lines = [
        (
            rf"% {one_line(results['subject'])} against each opponent, % of the judged prompts,"
            r" bootstrap 95 % intervals"
        ),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        rules,
        " & ".join(["", "", *(["Win", "Tie", "Lose"] * len(tasks)), "", ""]) + r" \\",
        r"\midrule",
    ]
    for opponent in opponents(results):
        failed, flipped, _ = totals(results, opponent)
        cells = [tasks[task].get(opponent) for task in tasks]
        shares = [
            percent(c[o], c["n"]).replace("–", "--") if c else "--" for c in cells for o in OUTCOMES
        ]
        small = [
            rf"{{\tiny {interval(c['ci95'][o])}}}" if c and c["n"] else ""
            for c in cells
            for o in OUTCOMES
        ]
        lines.append(
            " & ".join(
                [latex(judge_name(results)), latex(opponent), *shares, f"{failed}", f"{flipped}"]
            )
            + r" \\"
        )
        lines.append(" & ".join(["", "", *small, "", ""]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


def markdown(text: str) -> str:
    """Text as Markdown shows it: no markup, no cell border, no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", one_line(text))


def latex(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(LATEX.get(character, character) for character in one_line(text))
