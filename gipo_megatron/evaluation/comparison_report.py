"""An evaluation's report.html: it opens anywhere, loads nothing from a network, runs no script."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    Comparison,
    HeadToHead,
    Response,
)
from gipo_megatron.files import write_text
from gipo_megatron.reports.audit import Audit
from gipo_megatron.reports.audit_page import audit_html
from gipo_megatron.reports.pages import number, render

TEMPLATES = Path(__file__).parent / "templates"
FLIPPED = "flipped"
KINDS = (WIN, LOSE, TIE, FLIPPED, FAILED)  # of samples
PER_OUTCOME = 2  # samples of each outcome of a pair
SHOWN = 6000  # characters of a text that the page keeps
REASONS = 20  # kinds of failure listed
SCREEN, PRINT = 105, 160  # dots an inch: on a page, and of reports.figures.rendered
FILES = ("recipe.yaml", "environment.json")  # of the run folder, shown unchanged
FIGURES = ("n", "score", "length", "kl", "distinct_1", "distinct_2", "refusal_rate", "finished")


def write_comparison(
    folder: str | Path,
    given: HeadToHead,
    results: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    figures: Mapping[str, Path],
    audits: Sequence[Audit] = (),
) -> Path:
    """Write report.html to `folder`, all or nothing; it shows the folder's FILES too.

    `figures`: name -> PNG file. `audits`: a section for each.
    """
    folder = Path(folder)
    files = {
        name: (folder / name).read_text(encoding="utf-8", errors="replace")
        for name in FILES
        if (folder / name).is_file()
    }
    cells = [
        (task, baseline, cell)
        for task, by_baseline in results["tasks"].items()
        for baseline, cell in by_baseline.items()
    ]
    page = render(
        "comparison.html.j2",
        TEMPLATES,
        title=f"{given.model}: win / tie / lose",
        model=given.model,
        incomplete=results["incomplete"],
        warnings=results["warnings"],
        outcomes=OUTCOMES,
        cells=cells,
        percent=percent,
        interval=interval,
        judge_notes=results["judge"].get("notes", []),
        images=[_image(name, figure) for name, figure in figures.items()],
        audits=[audit_html(audit) for audit in audits],
        figures=FIGURES,
        policies=results["policies"],
        flips=[_flips(task, baseline, comparisons) for task, baseline, _ in cells],
        failures=_failures(comparisons),
        per_outcome=PER_OUTCOME,
        samples=_samples(given, comparisons),
        command=_command(files.get("environment.json", "{}")),
        judge_name=judge_name(results),
        bootstrap=results["bootstrap"],
        judge=json.dumps(results["judge"], indent=1, ensure_ascii=False),
        files=files,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


# ------------------------------------------------------------------------------------------- tables


def _flips(task: str, baseline: str, comparisons: Sequence[Comparison]) -> tuple[Any, ...]:
    own = [c for c in comparisons if (c.task, c.baseline) == (task, baseline)]
    judged = [c for c in own if c.outcome != FAILED]
    flips = Counter(c.model_first.choice for c in judged if c.flipped)
    rate = percent(flips.total(), len(judged))
    return task, baseline, flips[FIRST], flips[SECOND], rate, len(own) - len(judged), len(own)


def _failures(comparisons: Sequence[Comparison]) -> list[tuple[str, int]]:
    reasons = Counter(
        _cut(verdict.text, 300) or "(nothing)"
        for c in comparisons
        for verdict in (c.model_first, c.baseline_first)
        if verdict.choice == FAILED
    )
    rest = sum(count for _, count in reasons.most_common()[REASONS:])
    return [*reasons.most_common(REASONS), *([("(others)", rest)] if rest else [])]


def _command(environment: str) -> str:
    """Return the command line of environment.json, or "" if the file has none."""
    try:
        command = json.loads(environment)["command"]
    except (ValueError, KeyError, TypeError):
        return ""
    return shlex.join(map(str, command)) if isinstance(command, list) else ""


# ------------------------------------------------------------------------------------------ samples


def _samples(
    given: HeadToHead, comparisons: Sequence[Comparison]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (task and pair, its samples): up to PER_OUTCOME of each outcome, wins first."""
    questions = {(p.task, p.prompt_id): p.question for p in given.prompts}
    responses = given.by_prompt
    pairs: dict[tuple[str, str], dict[str, list[Comparison]]] = {}
    for c in comparisons:
        kinds = pairs.setdefault((c.task, c.baseline), {kind: [] for kind in KINDS})
        kinds[FLIPPED if c.flipped else c.outcome].append(c)
    samples = []
    for (task, baseline), kinds in pairs.items():
        rows = []
        for kind, found in kinds.items():
            for c in sorted(found, key=lambda c: c.prompt_id)[:PER_OUTCOME]:
                both = [responses[name, task, c.prompt_id] for name in (given.model, baseline)]
                rows.append(_sample(kind, c, questions[task, c.prompt_id], both))
        samples.append((f"{task}: {given.model} against {baseline}", rows))
    return samples


def _sample(
    kind: str, comparison: Comparison, question: str, responses: Sequence[Response]
) -> dict[str, Any]:
    p_high = comparison.p_high
    high = "" if p_high is None else f" · p_high {number(p_high)}"
    names = [response.policy for response in responses]
    verdicts = []
    for order, verdict in (
        (names, comparison.model_first),
        (names[::-1], comparison.baseline_first),
    ):
        chosen = {FIRST: order[0], SECOND: order[1]}.get(verdict.choice, verdict.choice)
        text = _cut(verdict.text) or "(no text)"
        verdicts.append((f"{order[0]} shown first: {chosen}", text))
    return {
        "title": f"{kind} · {comparison.source} · {comparison.prompt_id}{high}",
        "question": _cut(question),
        "responses": [(_heading(r), _cut(r.text) or "(empty)") for r in responses],
        "verdicts": verdicts,
    }


def _heading(response: Response) -> str:
    figures = "".join(f" · {name} {number(value)}" for name, value in response.figures.items())
    cut = "" if response.finished else ", cut"
    return f"{response.policy} · {response.tokens} tokens{cut}{figures}"


def _cut(text: str, most: int = SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} more characters)"


def _image(name: str, figure: Path) -> dict[str, Any]:
    """Return an <img>'s values; it is as wide as in a run's report, independent of its pixels."""
    data, plain = figure.read_bytes(), name.replace("_", " ")
    width = round(int.from_bytes(data[16:20], "big") * SCREEN / PRINT)  # of the PNG's header
    return {"name": plain, "caption": CAPTIONS.get(name, plain), "data": data, "width": width}
