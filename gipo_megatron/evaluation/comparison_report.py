"""An evaluation's report.html: opens anywhere, asks no network for anything, runs no script."""

from __future__ import annotations

import base64
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gipo_megatron.evaluation.comparison_page import ADDED_STYLE, COMPARISON_PAGE, STYLE
from gipo_megatron.evaluation.evaluation_figures import CAPTIONS
from gipo_megatron.evaluation.statistics import OUTCOMES
from gipo_megatron.evaluation.tables import interval, judge_name, percent
from gipo_megatron.evaluation.types import (
    FAILED,
    FIRST,
    LOSE,
    SECOND,
    TIE,
    WIN,
    Duel,
    Response,
    TaskPrompt,
)
from gipo_megatron.files import write_text
from gipo_megatron.reports.audit import Audit
from gipo_megatron.reports.audit_page import audit_html
from gipo_megatron.reports.pages import number, printable

FLIPPED = "flipped"
PER_OUTCOME = 2  # samples of each outcome of a pair
SHOWN = 6000  # characters of a text that the page keeps
REASONS = 20  # kinds of failure listed
SCREEN, PRINT = 105, 160  # dots an inch: on a page, and of telemetry.figures.rendered
FILES = ("recipe.yaml", "environment.json")  # of the run folder, shown as they are
FIGURES = ("n", "score", "length", "kl", "distinct_1", "distinct_2", "refusal_rate", "finished")

TWICE = (
    "Every pair is judged twice with the order swapped; a win or a loss counts only if both"
    " verdicts agree, everything else is a tie."
)
NOTES = (
    (
        "failed: prompts where a verdict was missing or could not be read. They are counted apart,"
        " never guessed, and are in no share."
    ),
    (
        "flipped: ties where the judge preferred a place (first both times, or second both times),"
        " not an answer."
    ),
    (
        "Intervals: percentile bootstrap over prompts. One without width says only that all"
        " outcomes were the same."
    ),
    (
        "sign test: exact and two-sided, wins against losses; ties are left out. Not corrected for"
        " the number of rows."
    ),
)


def write_comparison(
    folder: str | Path,
    results: Mapping[str, Any],
    prompts: Sequence[TaskPrompt],
    responses: Mapping[str, Sequence[Response]],
    duels: Sequence[Duel],
    figures: Mapping[str, bytes | Path],
    audits: Sequence[Audit] = (),
) -> Path:
    """Writes report.html to `folder`, all or nothing; recipe.yaml and environment.json found there
    are shown in it.

    `figures`: name -> PNG or SVG, as bytes or as a file. `audits`: what the group classifier
    learnt, a section each.

    Raises ValueError for a figure of another format.
    """
    folder = Path(folder)
    texts = {
        name: printable((folder / name).read_text(encoding="utf-8", errors="replace"))
        for name in FILES
        if (folder / name).is_file()
    }
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(COMPARISON_PAGE)
    text = page.render(
        title=f"{printable(results['subject'])}: win / tie / lose",
        style=Markup(STYLE + ADDED_STYLE),  # ours, no data in it
        subject=printable(results["subject"]),
        main=[_row(task, opponent, cell) for task, opponent, cell in _cells(results)],
        notes=[*results["judge"].get("notes", [TWICE]), *NOTES],  # people judge once, and say so
        images=[_image(name, figure) for name, figure in figures.items()],
        audits=[Markup(audit_html(audit)) for audit in audits],  # escaped there
        lengths=[
            (
                printable(task),
                printable(opponent),
                c["length_controlled_note"],
                _share(c["preference"]),
                _share(c["length_controlled_win"]),
            )
            for task, opponent, c in _cells(results)
        ],
        policy_header=["policy", "task", *(name.replace("_", " ") for name in FIGURES)],
        policies=[
            (
                printable(policy),
                printable(task),
                *("–" if row[f] is None else number(row[f]) for f in FIGURES),
            )
            for policy, tasks in results["policies"].items()
            for task, row in tasks.items()
        ],
        parts=[
            ("source", _parts(results, "by_source")),
            ("inferred group", _parts(results, "by_group")),
        ],
        flips=[
            _flips(task, opponent, [d for d in duels if (d.task, d.opponent) == (task, opponent)])
            for task, opponent, _ in _cells(results)
        ],
        failures=_failures(duels),
        per_outcome=PER_OUTCOME,
        samples=_samples(results["subject"], prompts, responses, duels),
        made=_made(results, texts),
        judge=printable(json.dumps(results["judge"], indent=1, ensure_ascii=False)),
        files=list(texts.items()),
    )
    write_text(folder / "report.html", text)
    return folder / "report.html"


def _cells(results: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    return [
        (task, opponent, cell)
        for task, cells in results["tasks"].items()
        for opponent, cell in cells.items()
    ]


def _row(task: str, opponent: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    n = cell["n"]
    shares = [(percent(cell[o], n), interval(cell["ci95"][o])) for o in OUTCOMES]
    return {
        "task": printable(task),
        "opponent": printable(opponent),
        "bar": ", ".join(f"{o} {percent(cell[o], n)} %" for o in OUTCOMES),
        "widths": [(o, f"{100 * cell[o] / n:.3f}") for o in OUTCOMES] if n else [],
        "shares": shares,
        "p": number(cell["sign_test_p"]),
        **{key: cell[key] for key in ("n", "failed", "flipped")},
    }


def _parts(results: Mapping[str, Any], key: str) -> list[tuple[Any, ...]]:
    return [
        (
            *map(printable, (task, opponent, name)),
            *(f"{percent(part[o], part['n'])} {interval(part['ci95'][o])}" for o in OUTCOMES),
            *(part[k] for k in ("n", "failed", "flipped")),
            number(part["sign_test_p"]),
        )
        for task, opponent, cell in _cells(results)
        for name, part in cell[key].items()
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _flips(task: str, opponent: str, duels: Sequence[Duel]) -> tuple[Any, ...]:
    judged = [duel for duel in duels if duel.outcome != FAILED]
    first = sum(duel.flipped and duel.subject_first.choice == FIRST for duel in judged)
    flipped = sum(duel.flipped for duel in judged)
    failed = len(duels) - len(judged)
    return (
        printable(task),
        printable(opponent),
        first,
        flipped - first,
        percent(flipped, len(judged)),
        failed,
        len(duels),
    )


def _failures(duels: Sequence[Duel]) -> list[tuple[str, int]]:
    said = Counter(
        _cut(v.said, 300) or "(nothing)"
        for d in duels
        for v in (d.subject_first, d.opponent_first)
        if v.choice == FAILED
    )
    rest = sum(count for _, count in said.most_common()[REASONS:])
    return [*said.most_common(REASONS), *([("(others)", rest)] if rest else [])]


def _samples(
    subject: str,
    prompts: Sequence[TaskPrompt],
    responses: Mapping[str, Sequence[Response]],
    duels: Sequence[Duel],
) -> list[tuple[str, list[dict[str, Any]]]]:
    """(task and pair, its samples): up to PER_OUTCOME of each outcome, wins first."""
    questions = {(p.task, p.prompt_id): p.question for p in prompts}
    answers = {(name, r.task, r.prompt_id): r for name, rows in responses.items() for r in rows}
    pairs: dict[tuple[str, str], dict[str, list[Duel]]] = {}
    for duel in duels:
        kinds = pairs.setdefault(
            (duel.task, duel.opponent), {kind: [] for kind in (WIN, LOSE, TIE, FLIPPED, FAILED)}
        )
        kinds[FLIPPED if duel.flipped else duel.outcome].append(duel)
    groups = []
    for (task, opponent), kinds in pairs.items():
        rows = []
        for kind, all_of_it in kinds.items():
            for duel in sorted(all_of_it, key=lambda d: d.prompt_id)[:PER_OUTCOME]:
                both = (
                    answers[subject, task, duel.prompt_id],
                    answers[opponent, task, duel.prompt_id],
                )
                rows.append(_sample(kind, duel, questions[task, duel.prompt_id], *both))
        groups.append((printable(f"{task}: {subject} against {opponent}"), rows))
    return groups


def _sample(
    kind: str, duel: Duel, question: str, mine: Response, theirs: Response
) -> dict[str, Any]:
    high = "" if duel.p_high is None else f" · p_high {number(duel.p_high)}"
    names = (mine.policy, theirs.policy)
    verdicts = []
    for order, verdict in ((names, duel.subject_first), (names[::-1], duel.opponent_first)):
        chosen = (
            order[0]
            if verdict.choice == FIRST
            else order[1]
            if verdict.choice == SECOND
            else verdict.choice
        )
        verdicts.append((f"{order[0]} shown first: {chosen}", verdict.said))
    return {
        "title": printable(f"{kind} · {duel.source} · {duel.prompt_id}{high}"),
        "question": _cut(question),
        "left": _heading(mine),
        "right": _heading(theirs),
        "left_text": _cut(mine.text) or "(empty)",
        "right_text": _cut(theirs.text) or "(empty)",
        "verdicts": printable("; ".join(order for order, _ in verdicts)),
        "said": [
            f"{printable(order)}\n{_cut(said) or '(nothing said)'}" for order, said in verdicts
        ],
    }


def _heading(response: Response) -> str:
    figures = "".join(f" · {name} {number(value)}" for name, value in response.figures.items())
    return printable(
        f"{response.policy} · {response.tokens}"
        f" tokens{'' if response.finished else ', cut'}{figures}"
    )


def _cut(text: str, most: int = SHOWN) -> str:
    return printable(
        text if len(text) <= most else f"{text[:most]} … ({len(text) - most} more characters)"
    )


def _made(results: Mapping[str, Any], texts: Mapping[str, str]) -> list[str]:
    lines = [
        f"judge: {printable(judge_name(results))}",
        (
            f"intervals: {results['bootstrap']['resamples']} resamples of the prompts, seed"
            f" {results['bootstrap']['seed']}"
        ),
        (
            "score: mean raw reward of the reward model; kl: mean over responses of the summed"
            " log-probability ratio to the reference, in nats; length: tokens; finished: share that"
            " ended by itself"
        ),
        (
            "distinct n: different n-grams over all n-grams of all responses together; refusal"
            " rate: share with a refusing phrase at its start (a fixed English list)"
        ),
        (
            "inferred group: high where the group classifier's mean p_high over all policies'"
            " responses to the prompt is above 0.5"
        ),
    ]
    try:
        command = json.loads(texts.get("environment.json", "{}"))["command"]
    except (ValueError, KeyError, TypeError):
        return lines
    return (
        [f"command: {shlex.join(map(str, command))}", *lines]
        if isinstance(command, list)
        else lines
    )


def _image(name: str, figure: bytes | Path) -> dict[str, Any]:
    """An SVG inside <img> runs no script and loads nothing. A PNG is shown as wide as in a run's
    report, whatever its pixels."""
    data = figure.read_bytes() if isinstance(figure, Path) else figure
    plain = printable(name).replace("_", " ")
    row = {
        "name": plain,
        "caption": CAPTIONS.get(name, plain),
        "data": base64.b64encode(data).decode(),
    }
    if data.startswith(b"\x89PNG"):
        return {
            **row,
            "kind": "image/png",
            "width": round(int.from_bytes(data[16:20], "big") * SCREEN / PRINT),
        }
    if data.lstrip()[:5] in (b"<?xml", b"<svg ") and b"<svg" in data[:2000]:
        return {**row, "kind": "image/svg+xml", "width": 0}
    raise ValueError(f"figure {name!r} is neither PNG nor SVG")
