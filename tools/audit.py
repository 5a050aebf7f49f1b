"""Audit group classifiers:  python tools/audit.py RUN_DIR… [out=DIR]

A RUN_DIR is a training run with a group classifier, or an evaluation with models.critic (then each
policy is audited). Writes audit.json and audit.html to `out`; without it into the run's own folder,
or ./audit for several runs. Exit codes: 0 done (alarms are printed), 2 a mistake in the command or
in a run folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gipo_megatron.cli import run
from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.audit import audit_responses
from gipo_megatron.evaluation.types import Response, TaskPrompt
from gipo_megatron.files import bad_line, expand, read_jsonl, write_json, write_text
from gipo_megatron.reports.audit import Audit, audit_run
from gipo_megatron.reports.audit_page import audit_document, facts, signed
from gipo_megatron.reports.runs import load_run

Noun = TypeVar("Noun", TaskPrompt, Response)
FIX = "remove the line, and evaluate again"


def parse(arguments: list[str]) -> tuple[list[str], Path]:
    """Return run folders and out. Raises UserError for an unknown option."""
    runs, out = [], None
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "out" and value:
            out = Path(expand(value))
        elif argument.startswith("-") or (equals and not Path(argument).exists()):
            raise UserError(f"unknown option {argument!r}", fix="the option is out=DIR")
        else:
            runs.append(expand(argument))
    if not runs:
        raise UserError("no run folder given", fix="python tools/audit.py RUN_DIR… [out=DIR]")
    return runs, out or (Path(runs[0]) if len(runs) == 1 else Path("audit"))


def audits_of(folder: Path) -> list[Audit]:
    """Audit a training run, or each policy of an evaluation that has p_high. Raises UserError."""
    if not (folder / "prompts.jsonl").is_file():
        return [audit_run(load_run(folder))]
    prompts = _read(folder / "prompts.jsonl", TaskPrompt)
    answers = [_read(path, Response) for path in sorted((folder / "responses").glob("*.jsonl"))]
    audits = [
        audit_responses(prompts, rows)
        for rows in answers
        if any("p_high" in r.figures for r in rows)
    ]
    if not audits:
        raise UserError(
            "no response with p_high",
            where=str(folder / "responses"),
            fix="evaluate with models.critic",
        )
    return audits


def _read(path: Path, kind: Callable[..., Noun]) -> list[Noun]:
    """Return the rows, each prompt once, without the head line."""
    found: dict[tuple[str, str], Noun] = {}
    for number, row in read_jsonl(path, FIX):
        if set(row) == {"key"}:
            continue
        try:
            found.setdefault((row["task"], row["prompt_id"]), kind(**row))
        except (TypeError, KeyError):
            raise bad_line(path, number, f"not a {kind.__name__}", FIX) from None
    return list(found.values())


def print_table(audits: list[Audit]) -> None:
    """Print correlations (Spearman) of p_high, AUC by source, entropy: a column per audit."""
    table = Table("", *(escape(audit.name) for audit in audits), box=SIMPLE)
    quantities = dict.fromkeys(a.quantity for audit in audits for a in audit.associations)
    sources = dict.fromkeys(label.name for audit in audits for label in audit.sources)
    columns = [_cells(audit) for audit in audits]
    for row in (
        "responses",
        "high group",
        "entropy",
        *(f"Spearman: {q}" for q in quantities),
        *(f"AUC: {s}" for s in sources),
        "AMI: source",
    ):
        table.add_row(
            escape(row), *(escape(cells[row]) if row in cells else "–" for cells in columns)
        )
    console = Console()
    console.width = max(console.width, 120)  # redirected output has no width
    console.print(table)


def _cells(audit: Audit) -> dict[str, str]:
    return {
        "responses": str(audit.rows),
        "high group": f"{100 * audit.share_high:.0f} %",
        "entropy": f"{audit.entropy.mean:.3f}",
        **{f"Spearman: {a.quantity}": signed(a.spearman) for a in audit.associations},
        **{
            f"AUC: {label.name}": "–" if label.auc is None else f"{label.auc:.2f}"
            for label in audit.sources
        },
        "AMI: source": "–" if audit.source_ami is None else f"{audit.source_ami:.2f}",
    }


def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        runs, out = parse(arguments)
        audits = [audit for run in runs for audit in audits_of(Path(run))]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print_table(audits)
    for audit in audits:
        print(f"{audit.name}: {facts(audit)}")
        for alarm in audit.alarms:
            print(f"  ALARM {alarm}")
    write_json(out / "audit.json", [audit.as_json() for audit in audits])
    write_text(out / "audit.html", audit_document(audits))
    print(f"written: {out / 'audit.json'}, {out / 'audit.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(partial(main, sys.argv[1:])))
