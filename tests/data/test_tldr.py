from __future__ import annotations

from typing import Any

import pytest

from gipo_megatron.data.examples import BadRow, Example, Tally
from gipo_megatron.data.schemas import Schema
from gipo_megatron.errors import UserError

INFO = {
    "id": "t3_1",
    "subreddit": "tifu",
    "title": "by waiting",
    "post": "So I waited.\n\nAnd waited.",
    "site": None,
    "article": None,
}
PAIR = {
    "info": INFO,
    "summaries": [{"text": " one"}, {"text": " two", "policy": "ref"}],
    "choice": 1,
    "batch": "batch3",
    "worker": "w",
}
POST = {
    "id": "t3_1",
    "subreddit": "tifu",
    "title": "by waiting",
    "post": "So I waited.\n\nAnd waited.",
    "summary": "I waited.",
}
# tldr_task of OpenAI's released code
TEXT = "SUBREDDIT: r/tifu\n\nTITLE: by waiting\n\nPOST: So I waited.\n\nAnd waited.\n\nTL;DR:"


def read(
    format: str, row: dict[str, Any], head: dict[str, Any] | None = None, **columns: str
) -> Example:
    return Schema(format, columns, [head or row], "here").read(row, "s", Tally(), "here")


def test_comparisons() -> None:
    example = read("preference", PAIR)
    assert example.prompt[0].text == TEXT
    assert example.responses == (" two", " one")
    assert read("preference", {**PAIR, "choice": 0}).responses == (" one", " two")
    assert example.source == "s" and example.extras == {
        "subreddit": "tifu",
        "batch": "batch3",
        "worker": "w",
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choice": None}, "a comparison without a choice"),
        ({"choice": 2}, "a comparison without a post, two summaries and a choice of 0 or 1"),
        (
            {"summaries": [{"text": " one"}]},
            "a comparison without a post, two summaries and a choice of 0 or 1",
        ),
        ({"summaries": None}, "a comparison without a post, two summaries and a choice of 0 or 1"),
        (
            {"info": {"id": "t3_1"}},
            "a comparison without a post, two summaries and a choice of 0 or 1",
        ),
        (
            {"info": {**INFO, "post": None, "subreddit": None, "article": "News."}},
            "not a Reddit post (a news article?)",
        ),
        ({"summaries": [{"text": " one"}, {"text": "one "}]}, "chosen equals rejected"),
        ({"summaries": [{"text": " one"}, {"text": " "}]}, "empty response"),
        ({"summaries": [{"text": " one"}, {"text": None}]}, "no value for chosen"),
    ],
)
def test_bad_comparisons_are_dropped_by_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as raised:
        read("preference", {**PAIR, **change}, head=PAIR)
    assert str(raised.value) == reason


def test_posts() -> None:
    example = read("sft", POST)
    assert (example.prompt[0].text, example.responses) == (TEXT, (" I waited.",))
    assert example.extras == {"subreddit": "tifu", "id": "t3_1"}
    prompt = read("prompt", POST)
    assert (prompt.prompt, prompt.responses) == (example.prompt, ())
    assert (
        read("prompt", {name: POST[name] for name in ("subreddit", "title", "post")}).prompt
        == example.prompt
    )


@pytest.mark.parametrize("column", ["label", "completion"])
def test_posts_with_the_prompt_made(column: str) -> None:
    example = read("sft", {"prompt": TEXT, column: " I waited."})
    assert (example.prompt[0].text, example.responses, example.extras) == (
        TEXT,
        (" I waited.",),
        {"subreddit": "tifu"},
    )


def test_bad_posts() -> None:
    for change, reason in (
        ({"summary": None}, "no value for response"),
        ({"post": None}, "not a Reddit post"),
        ({"summary": ""}, "empty"),
    ):
        with pytest.raises(BadRow, match=reason):
            read("sft", {**POST, **change}, head=POST)
    with pytest.raises(UserError, match="needs the columns prompt"):
        read("sft", {name: POST[name] for name in ("subreddit", "title", "post")})


def test_a_label_that_is_no_text_is_no_response() -> None:
    with pytest.raises(UserError, match=r"needs the columns prompt \+ response"):
        read("sft", {"prompt": "p", "label": 1})


@pytest.mark.parametrize(
    ("format", "row"),
    [("preference", PAIR), ("sft", POST), ("prompt", {"prompt": TEXT, "label": " x"})],
)
def test_the_subreddit_may_be_the_given_label(format: str, row: dict[str, Any]) -> None:
    assert read(format, row, source="subreddit").source == "tifu"
