"""Write a table, figures and a report of run folders.

gipo plot RUN_DIR… [out=DIR] [report=PATH]

Figures (PNG, SVG and PDF) go to `out`; without it into the run's own figures/ folder, or ./figures
for several runs. Exit code 0: done; 2: a mistake in the command or in a run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gipo_megatron.errors import UserError
from gipo_megatron.files import expand
from gipo_megatron.reports.figures import write_figures
from gipo_megatron.reports.run_report import summaries, write_report
from gipo_megatron.reports.runs import load_run
from gipo_megatron.screen import shown


def parse(arguments: Sequence[str]) -> tuple[list[str], str, str | None]:
    """Run folders, out, report. Raises UserError."""
    runs: list[str] = []
    options: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("out", "report") and value:
            options[key] = expand(value)
        elif argument.startswith("-") or (equals and not Path(argument).exists()):
            raise UserError(
                f"unknown option {argument!r}", fix="options are out=DIR and report=PATH"
            )
        else:
            runs.append(expand(argument))
    if not runs:
        raise UserError("no run folder given", fix="gipo plot RUN_DIR… [out=DIR] [report=PATH]")
    out = (
        options["out"]
        if "out" in options
        else str(Path(runs[0], "figures") if len(runs) == 1 else Path("figures"))
    )
    return runs, out, options.get("report")


def print_table(rows: list[dict[str, str]]) -> None:
    """Stage, time and key figure of each run."""
    table = Table(*rows[0], box=SIMPLE)
    for row in rows:
        table.add_row(*(escape(shown(cell)) for cell in row.values()))
    console = Console()
    console.width = max(console.width, 120)  # redirected output has no width
    console.print(table)


def main(argv: Sequence[str]) -> int:
    runs, out, report = parse(argv)
    print_table(summaries([load_run(run) for run in runs]))
    if report is not None:
        print(f"report: {write_report(runs, report)}")
    written, missing = write_figures(runs, out)
    print(f"{len(written)} files in {out}: {', '.join(sorted({p.stem for p in written}))}")
    for name, why in missing.items():
        print(f"not drawn: {name} ({why})")
    return 0
