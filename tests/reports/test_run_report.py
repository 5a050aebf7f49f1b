from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gipo_megatron.algorithms.reward_model import RewardModelling
from gipo_megatron.errors import UserError
from gipo_megatron.reports.gold import gold_course
from gipo_megatron.reports.pages import number
from gipo_megatron.reports.run_report import summaries, summary, write_report
from gipo_megatron.reports.runs import load_run
from gipo_megatron.screen import printable
from tests.reports.synthetic import MARKUP, ppo_run, sft_run, write_rows

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[Page, str]:
    folder = tmp_path_factory.mktemp("report")
    dirs = [sft_run(folder / "sft"), ppo_run(folder / "gipo", steps=12)]
    out = write_report(dirs, folder / "deep/report.html", title="<i>demo</i>")
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    text = out.read_text(encoding="utf-8")
    return Page(text), text


def test_nothing_is_fetched(report) -> None:
    page, text = report
    assert not {"script", "iframe", "object", "form", "b", "i", "collapsed"} & set(page.tags)
    images = [value for _, key, value in page.attributes if key == "src"]
    assert len(images) == 11  # all figures but accuracy and gold by source
    for image in images:
        head, _, body = image.partition(",")
        assert head == "data:image/png;base64" and base64.b64decode(body)[:4] == b"\x89PNG"
    links = [(tag, value) for tag, key, value in page.attributes if key == "href"]
    assert links == [("link", "data:,"), ("a", "#run1"), ("a", "#run2")]
    assert (
        re.search(r"(https?:)?//", re.sub(r"base64,[^\"]*", "", text)) is None
        and "url(" not in text
    )
    assert (
        "meta",
        "content",
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none';"
        " form-action 'none'",
    ) in page.attributes


def test_markup_is_shown_as_text(report) -> None:
    page, _ = report
    assert page.text.count(MARKUP) == 8  # four rows of the first, four of the last step
    assert (
        "a group <collapsed>" in page.text
        and "note: <b>bold</b>" in page.text
        and '"<abc>"' in page.text
    )
    assert "<i>demo</i>" in page.text


def test_summary_and_what_is_missing(report) -> None:
    page, _ = report
    words = " ".join(page.text.split())
    assert "loss 5 → 0.625 (step 8)" in words and "0:04" in words and "0:30" in words
    assert "accuracy: no <name>/accuracy" in words
    assert "groups/return_high" in words


@pytest.mark.parametrize(
    ("values", "course"),
    [
        ([0.5, 0.75, 0.25], "peak 0.75 at step 10, final 0.25, lost 0.5"),
        ([0.5, 0.25, 0.75], "peak 0.75 at step 20, final 0.75, lost 0"),
        ([0.5, 0.25, 0.5], "peak 0.5 at step 0, final 0.5, lost 0"),
        ([], ""),
    ],
)
def test_the_course_of_gold(tmp_path: Path, values: list[float], course: str) -> None:
    """By hand. A run without gold has a dash beside one that has it, and no column alone."""
    rows = [{"step": 10 * i, "eval/gold": value} for i, value in enumerate(values)]
    for name in ("gold", "none"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "gold" / "metrics.jsonl", rows)
    write_rows(tmp_path / "none" / "metrics.jsonl", [{"step": 1, "sft/loss": 1.0}])
    gold, none = load_run(tmp_path / "gold"), load_run(tmp_path / "none")
    assert gold_course(gold) == course and gold_course(none) == ""
    shown = [row.get("held-out gold") for row in summaries([gold, none])]
    assert shown == ([course, "–"] if values else [None, None])


def test_key_figures(tmp_path: Path) -> None:
    run = load_run(ppo_run(tmp_path / "gipo", steps=20))
    row = summary(run)
    assert row["stage"] == "PPO" and row["alerts"] == "1"
    assert re.fullmatch(
        r"held-out score \S+ → \S+ \(step 20\); held-out gold \S+ → \S+ \(step 20\)",
        row["key figure"],
    )
    assert re.fullmatch(
        r"score \S+ → \S+ \(step 9\)",
        summary(load_run(ppo_run(tmp_path / "short", steps=9)))["key figure"],
    )
    about = {"stage": RewardModelling.stage, "headline": RewardModelling.headline}
    (tmp_path / "environment.json").write_text(json.dumps(about))
    write_rows(
        tmp_path / "metrics.jsonl",
        [{"step": 9, "rm/loss": 0.5, "rm/accuracy": 0.9, "eval/accuracy": 0.8, "eval/pairs": 100}],
    )
    assert summary(load_run(tmp_path))["key figure"].startswith(
        "held-out accuracy 0.8 [0.7112, 0.8666] (step 9)"
    )  # Wilson's interval, by hand
    write_rows(tmp_path / "metrics.jsonl", [])
    assert summary(load_run(tmp_path))["key figure"] == "–"


def test_figures_are_files_too(tmp_path: Path) -> None:
    folder, figures = sft_run(tmp_path / "sft"), tmp_path / "figures"
    write_report([folder], tmp_path / "r.html", figures_to=figures)
    names = sorted(p.name for p in figures.iterdir())
    assert names == ["loss.pdf", "loss.png", "loss.svg"]


def test_a_bad_folder_leaves_the_old_report(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("old")
    with pytest.raises(UserError):
        write_report([tmp_path / "nope"], tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == "old"


def test_control_characters_are_visible() -> None:
    assert printable("a\x00b\x1b[31m\r\n\tc\ud800") == "a\\x00b\\x1b[31m\n\tc\\ud800"
    assert [number(x) for x in (3.0, 0.123456, 1e12, -0.5)] == ["3", "0.1235", "1e+12", "-0.5"]
