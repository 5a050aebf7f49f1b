"""OpenAI's TL;DR data (Stiennon et al. 2020): Reddit posts with their authors' summaries, and
comparisons of two summaries.

A row of either becomes a standard one: the prompt of OpenAI's released code, summaries that begin
with one space, and the subreddit as a column.

    posts         {subreddit, title, post, summary}, or with the prompt made already: {prompt,
                  label}, {prompt, completion}
    comparisons   {info: {subreddit, title, post}, summaries: [{text}, {text}], choice: 0 | 1}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from gipo_megatron.data.examples import BadRow

Columns = dict[str, Any]
PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
POST = ("subreddit", "title", "post")
COMPARISON = ("info", "summaries", "choice")
# data.format -> where OpenAI's layout keeps its rows
PARTS = {"preference": "comparisons", "sft": "posts", "prompt": "posts"}
_SUBREDDIT = re.compile(r"SUBREDDIT: r/(\S+)\n")


def part_for(format: str, names: Collection[str]) -> str | None:
    """Return which of the sub-folders or configurations `names` serves data.format, or None where
    the layout is not OpenAI's."""
    return PARTS[format] if PARTS["preference"] in names else None


def recognise(
    format: str, columns: dict[str, str], head: Sequence[Columns]
) -> tuple[Callable[[Columns], Columns], list[str]]:
    """Return (function from a row to a standard row, columns of the standard row). The columns of
    the first rows and those that the user mapped decide."""
    found = list(dict.fromkeys(name for row in head for name in row))
    if format == "preference" and "chosen" not in columns and {*COMPARISON} <= {*found}:
        rest = [name for name in found if name not in COMPARISON]
        return from_comparison, [*rest, "subreddit", "prompt", "chosen", "rejected"]
    post = {"sft": (*POST, "summary"), "prompt": POST}.get(format, ())
    if post and not {"prompt", "messages"} & {*found, *columns} and {*post} <= {*found}:
        rest = [name for name in found if name not in (*POST, "summary")]
        return from_post, [*rest, "subreddit", "prompt", "response"]
    prompt = columns.get("prompt", "prompt")
    if "subreddit" not in found and any(_SUBREDDIT.match(str(row.get(prompt))) for row in head):
        return lambda row: {**row, "subreddit": _subreddit(row.get(prompt))}, [*found, "subreddit"]
    return lambda row: row, found


def from_comparison(row: Columns) -> Columns:
    """Raises BadRow."""
    if row["choice"] is None:
        raise BadRow("a comparison without a choice")
    try:
        texts = [summary["text"] for summary in row["summaries"]]
        if len(texts) != 2 or row["choice"] not in (0, 1):
            raise ValueError
        post = _prompted(row["info"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadRow("a comparison without a post, two summaries and a choice of 0 or 1") from error
    rest = {name: value for name, value in row.items() if name not in COMPARISON}
    return {**rest, **post, "chosen": texts[row["choice"]], "rejected": texts[1 - row["choice"]]}


def from_post(row: Columns) -> Columns:
    """Raises BadRow."""
    rest = {name: value for name, value in row.items() if name not in (*POST, "summary")}
    summary = row.get("summary")
    response = f" {summary}" if isinstance(summary, str) else None
    return {**rest, **_prompted(row), "response": response}


def _prompted(fields: Columns) -> Columns:
    """Raises BadRow for other texts than posts: OpenAI compares summaries of news articles, too."""
    post = {name: fields[name] for name in POST}
    if not all(isinstance(text, str) for text in post.values()):
        raise BadRow("not a Reddit post (a news article?)")
    return {"subreddit": post["subreddit"], "prompt": PROMPT.format(**post)}


def _subreddit(prompt: Any) -> str | None:
    found = _SUBREDDIT.match(str(prompt))
    return found.group(1) if found else None
