from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gipo_megatron.evaluation.audit import audit_responses
from gipo_megatron.evaluation.comparison_report import write_comparison
from gipo_megatron.evaluation.results import (
    build_results,
    comparisons_from_verdicts,
)
from tests.evaluation.simulated import MARKUP, head_to_head, prompts, verdicts
from tests.reports.test_run_report import Page

PNG = base64.b64decode(  # one grey dot
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


def evaluate(folder: Path, *, n: int = 30, model: str = "gipo <b>") -> Path:
    """A report of two tasks and two baselines, with markup wherever data can put it."""
    baselines = ["ppo", "sft<u>"]
    asked = [
        replace(p, question=f"{p.question} {MARKUP}", source=f"{p.source}<i>")
        for p in prompts(n, ("hh", "tl<dr>"))
    ]
    given = head_to_head(model, baselines, asked, markup=True)
    comparisons = comparisons_from_verdicts(given, verdicts(baselines, asked, 2))
    about = {"name": "rule <script>", "notes": ["a note of the judge <i>"], "cost": 0.0}
    warning = "ppo<i> was trained against the reward model that judges"
    results = build_results(given, comparisons, about, bootstrap=200, seed=3, warnings=[warning])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("run: {dir: <runs>}\n")
    (folder / "environment.json").write_text(
        json.dumps({"command": ["launch/evaluate.py", "recipe=a b"]})
    )
    (folder / "bars.png").write_bytes(PNG)
    audit = audit_responses(
        [p for p in asked if p.task == "hh"], [r for r in given.responses["ppo"] if r.task == "hh"]
    )
    figures = {"win_tie_lose": folder / "bars.png", "p<high>": folder / "bars.png"}
    return write_comparison(folder, given, results, comparisons, figures, [audit])


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[Page, str]:
    text = evaluate(tmp_path_factory.mktemp("evaluate") / "run").read_text(encoding="utf-8")
    return Page(text), text


def test_nothing_is_fetched_and_nothing_runs(report) -> None:
    page, text = report
    assert "Warning: ppo<i> was trained against the reward model that judges" in page.text
    assert not {"script", "iframe", "object", "form", "b", "i", "u", "runs", "dr"} & set(page.tags)
    images = [value for _, key, value in page.attributes if key == "src"]
    # the last one: the audit's
    assert [value.partition(",")[0] for value in images] == ["data:image/png;base64"] * 3
    assert base64.b64decode(images[0].partition(",")[2]) == PNG
    assert all(
        value.startswith("#") or value == "data:,"
        for _, key, value in page.attributes
        if key == "href"
    )
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert (
        "meta",
        "content",
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none';"
        " form-action 'none'",
    ) in page.attributes
    assert "url(" not in text and "@import" not in text


def test_markup_is_shown_as_text(report) -> None:
    page, _ = report
    shown = MARKUP.replace("\x00", "\\x00").replace("\u2028", "\\u2028")
    samples = 4 * 5 * 2  # pairs × outcomes × two of each
    assert (
        page.text.partition("Up to 2 prompts of each outcome")[2].count(shown) == 5 * samples
    )  # a question, and two answers that repeat it
    assert (
        page.text.count("; ppo shown first: ") + page.text.count("; sft<u> shown first: ")
        == samples
    )
    # wins on two tasks
    assert page.text.count("gipo <b> shown first: gipo <b>; ppo shown first: gipo <b>") == 2 * 2
    assert page.text.count("gipo <b> shown first: gipo <b>; ppo shown first: ppo") == 2 * 2  # flips
    assert page.text.count("Group audit: ppo") == 1
    assert (
        "reason <b>first</b>" in page.text
        and "a note of the judge <i>" in page.text
        and "p<high>" in page.text
    )
    assert "49" not in re.findall(r"\{\{.*?\}\}", page.text)


def test_numbers_and_how_they_were_made(report) -> None:
    page, _ = report
    words = " ".join(page.text.split())
    assert (
        "command: launch/evaluate.py 'recipe=a b'" in words
        and "200 resamples of the prompts, seed 3" in words
    )
    assert "run: {dir: <runs>}" in words and "HTTP 500 <script>" in words
    assert "source_0<i>" in words and "inferred group" in words
    shares = re.findall(r"\d+\.\d\[\d+\.\d, \d+\.\d\]", page.text)
    assert len(shares) == 12  # four pairs × win, tie, lose, in the table


def test_an_evaluation_without_baselines_or_answers(tmp_path: Path) -> None:
    asked = prompts(2)
    given = head_to_head("a", ["b"], asked)
    empty = [replace(r, text="", tokens=0) for r in given.responses["a"]]
    given = replace(given, responses={**given.responses, "a": empty})
    alone = replace(given, baselines=[])
    results = build_results(alone, [], {"name": "rule"}, bootstrap=10, seed=0)
    report = write_comparison(tmp_path, alone, results, [], {})
    assert "None was drawn." in Page(report.read_text(encoding="utf-8")).text
    failed = {k: replace(v, choice="failed", text="") for k, v in verdicts(["b"], asked, 0).items()}
    comparisons = comparisons_from_verdicts(given, failed)
    results = build_results(given, comparisons, {"name": "rule"}, bootstrap=10, seed=0)
    report = write_comparison(tmp_path, given, results, comparisons, {})
    page = Page(report.read_text(encoding="utf-8"))
    assert (
        "(empty)" in page.text
        and "0 judged prompts: at least 10" in page.text
        and "(nothing)4" in page.text.replace("\n", "")
    )
